#!/usr/bin/env bash
# The whole story on two CPU cores: sets up .venv/, trains a tiny policy with RL until its entropy collapses, reheats it,
# goes on with RL beside a control, and shows what came out. Arguments go to examples/countdown_cpu/demo.py.
#
#   bash scripts/demo.sh
#   bash scripts/demo.sh --seed 1 --arms reheat control rollout_temperature
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# packages are installed uncompiled: their first import must be allowed to leave its bytecode behind
export PYTHONDONTWRITEBYTECODE=
bash scripts/setup_env.sh
exec .venv/bin/python examples/countdown_cpu/demo.py "$@"
