#!/usr/bin/env bash
# The whole story on two CPU cores: sets up .venv/, trains a tiny policy with RL until its entropy collapses, reheats it,
# goes on with RL beside two controls, and shows what came out. Arguments go to examples/countdown_cpu/demo.py.
#
#   bash scripts/demo.sh
#   bash scripts/demo.sh --seed 1 --arms reheat control rollout_temperature
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# packages are installed uncompiled: their first import must be allowed to leave its bytecode behind
export PYTHONDONTWRITEBYTECODE=
# In a process group of its own, so that whoever ends this script ends the installation with it.
set -m
bash scripts/setup_env.sh &
setup=$!
set +m
end_setup() {
    kill -TERM -- "-$setup" 2>/dev/null || true
    wait "$setup" 2>/dev/null || true
    exit "$1"
}
trap 'end_setup 129' HUP
trap 'end_setup 130' INT
trap 'end_setup 143' TERM
wait "$setup"
trap - HUP INT TERM
exec .venv/bin/python examples/countdown_cpu/demo.py "$@"
