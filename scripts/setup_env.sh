#!/usr/bin/env bash
# Makes the CPU environment in .venv/ at the project root: torch, the pinned packages, then this project, editable.
#
#   bash scripts/setup_env.sh               # the first start takes minutes and 3 to 7 GB, later ones under a second
#   PYTHON=/path/to/python3.12 bash scripts/setup_env.sh
#
# It goes through pip alone, so whatever mirror, proxy or wheel folder pip is configured with is used. By default pip
# brings torch with its CUDA libraries, which then lie unused; point pip at CPU wheels of torch for a smaller .venv/.
# An install that was cut short is made anew: .venv/reheat-incomplete exists from the first change until all is done.
# A .venv/ made by other means is left alone.
# Two starts at once are safe: the second waits for the first.
set -euo pipefail
unset CDPATH

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$ROOT"

TORCH_VERSION=2.13.0
TRITON_VERSION=3.9.0
LOCK=scripts/requirements-cpu.lock
VENV=.venv
STAMP=$VENV/reheat-stamp            # what the finished environment was made from
OWNED=$VENV/reheat-root             # says that this script made .venv/, and for which folder: a venv cannot be moved
INCOMPLETE=$VENV/reheat-incomplete
LOG=$VENV/reheat-setup.log
HEARTBEAT=

say() { printf '[setup %4ss] %s\n' "$SECONDS" "$*"; }

fail() {
    printf '[setup] error: %s\n' "$*" >&2
    exit 1
}

fingerprint() {
    { printf '%s\n' "$ROOT"; cat "$LOCK" setup.py scripts/setup_env.sh; } | sha256sum | cut -d ' ' -f 1
}

is_ready() {
    [[ -x $VENV/bin/python && ! -e $INCOMPLETE && -f $STAMP && $(<"$STAMP") == "$WANTED" ]]
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null
        then
            echo "$candidate"
            return
        fi
        [[ -z ${PYTHON:-} ]] || fail "PYTHON=$PYTHON is not a Python 3.11 to 3.14 with the venv module; set PYTHON to one"
    done
    fail "no Python 3.11 to 3.14 with the venv module (tried python3.11, python3.12, python3.13, python3). Install one" \
        "(on Debian or Ubuntu: apt install python3 python3-venv), or name one: PYTHON=/path/to/python3.11 bash $0"
}

# A .venv/ that this script did not make (a GPU install, say) is used as it is: changing it could break it.
accept_foreign_venv() {
    "$VENV/bin/python" - <<'PYTHON' || fail "complete $ROOT/$VENV yourself, or remove it and run this script again"
import importlib.util
import sys

missing = [m for m in ("torch", "vllm", "megatron", "transformers") if importlib.util.find_spec(m) is None]
sys.exit(f"[setup] .venv/ was not made by this script and lacks: {', '.join(missing)}" if missing else 0)
PYTHON
    say "$VENV/ was not made by this script: used as it is"
}

# Creates .venv/ unless a usable one is there.
make_venv() {
    local python
    if [[ -x $VENV/bin/python && ! -e $INCOMPLETE && $(<"$OWNED") == "$ROOT" ]]; then
        return
    fi
    [[ ! -e $VENV ]] || say "$VENV/ is unfinished, moved, or lost its Python: making it anew"
    python=$(find_python)
    mkdir -p "$VENV"
    printf '%s\n' "$ROOT" >"$OWNED"
    : >"$INCOMPLETE"
    find "$VENV" -mindepth 1 -maxdepth 1 ! -path "$OWNED" ! -path "$INCOMPLETE" -exec rm -rf {} +
    say "creating $VENV/ with $("$python" -c 'import sys; print("Python", *sys.version.split()[:1], "at", sys.executable)')"
    "$python" -m venv "$VENV" >>"$LOG" 2>&1 || install_failed "creating $VENV/"
}

# Long downloads print nothing, so a line each half minute shows that the install is alive.
start_heartbeat() {
    (
        exec 9>&-
        while sleep 30 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do say "... still at it: $1"; done
    ) &
    HEARTBEAT=$!
}

stop_heartbeat() {
    [[ -z $HEARTBEAT ]] || { kill "$HEARTBEAT" && wait "$HEARTBEAT"; } 2>/dev/null || true
    HEARTBEAT=
}

# -I keeps a PYTHONPATH of the caller from passing for installed packages; pip reads its own settings all the same.
# --no-compile saves a third of the time and half a gigabyte: Python compiles what is imported when it is imported.
pip_install() {
    local step=$1
    shift
    say "$step"
    start_heartbeat "$step"
    printf '\n== pip install %s\n' "$*" >>"$LOG"
    PIP_USER=0 "$VENV/bin/python" -I -m pip install --no-compile --no-input --disable-pip-version-check --progress-bar off "$@" \
        >>"$LOG" 2>&1 || install_failed "$step"
    stop_heartbeat
}

install_failed() {
    stop_heartbeat
    printf '\n----- last 30 lines of %s -----\n' "$LOG" >&2
    tail -n 30 "$LOG" >&2
    printf -- '-----\n' >&2
    fail "$1 failed after $SECONDS s. Look for a network, proxy or index problem (pip config list), a full disk" \
        "(7 GB are needed) or an old pip setting above, then run bash scripts/setup_env.sh again"
}

WANTED=$(fingerprint)
if is_ready; then
    say "$VENV/ is ready"
    exit 0
fi

if command -v flock >/dev/null && exec 9>"$ROOT/.venv.lock"; then
    if ! flock --nonblock 9; then
        say "another setup is running in $ROOT: waiting for it"
        flock 9 || say "this file system has no locks: continuing without"
    fi
    if is_ready; then
        say "$VENV/ is ready"
        exit 0
    fi
fi
if [[ -e $VENV && ! -e $OWNED ]]; then
    accept_foreign_venv
    exit 0
fi
trap stop_heartbeat EXIT
trap 'say "interrupted; start again to finish"; exit 130' INT TERM HUP

if command -v nvidia-smi >/dev/null; then
    say "this machine has an NVIDIA GPU; this script makes the CPU environment. For the GPU: bash scripts/setup_gpu.sh"
fi
make_venv
: >"$INCOMPLETE"
pip_install "1 of 3: torch $TORCH_VERSION and what it needs" "torch==$TORCH_VERSION" --constraint "$LOCK"
# CUDA builds of torch bring Triton, CPU builds do not; the tests run the GPU kernels in its interpreter.
triton=()
if ! "$VENV/bin/python" -I -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("triton") is None)'; then
    triton=("triton==$TRITON_VERSION")
fi
pip_install "2 of 3: $(grep -c '^[a-z].*==' "$LOCK") pinned packages" --no-deps --requirement "$LOCK" "${triton[@]}"
pip_install "3 of 3: megatron-reheat itself, editable" --no-deps --no-build-isolation --use-pep517 --editable .
printf '%s\n' "$WANTED" >"$STAMP"
rm "$INCOMPLETE"
say "$VENV/ is ready; activate it with: source $VENV/bin/activate"
