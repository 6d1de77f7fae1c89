#!/usr/bin/env bash
# Sets up .venv/, then lint, format, types and tests; a failed check does not hide the next one.
#
#   bash scripts/test.sh                      # everything
#   bash scripts/test.sh --fast               # for everyday work: what FAST names, in less than four minutes
#   bash scripts/test.sh tests/unit -k config # arguments go to pytest
set -uo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# A run through every stage on two ranks, with real Megatron and real vLLM, TP and PP against transformers, and unit tests.
FAST=(
    tests/e2e/test_train.py::test_every_stage_runs_and_is_on_record
    tests/distributed/test_model_parity.py
    tests/unit
    -m "not slow"
)

# One thread per process: the distributed tests start several on one machine.
export OMP_NUM_THREADS=1
# Packages are installed uncompiled: their first import must be allowed to leave its bytecode behind, even where a user's
# environment says otherwise, or every one of the many processes would compile torch and vLLM again.
export PYTHONDONTWRITEBYTECODE=

selection=()
if [[ ${1:-} == --fast ]]; then
    shift
    selection=("${FAST[@]}")
fi
summary=()
failed=0

run_stage() {
    local name=$1 start=$SECONDS status=0 verdict=ok
    shift
    printf '\n== %s\n' "$name"
    "$@" || status=$?
    if ((status != 0)); then
        verdict="FAILED (exit $status)"
        failed=1
    fi
    summary+=("$(printf '%-7s %4ss  %s' "$name" $((SECONDS - start)) "$verdict")")
}

run_stage setup bash scripts/setup_env.sh
if ((failed == 0)); then
    run_stage lint .venv/bin/python -m ruff check .
    run_stage format .venv/bin/python -m ruff format --check .
    run_stage types .venv/bin/python -m mypy
    # Two files at a time: many tests keep one core busy. `bash scripts/test.sh -n 0` runs them one after another, as does
    # a .venv/ of other make that lacks pytest-xdist.
    workers=()
    if .venv/bin/python -c 'import xdist' 2>/dev/null; then workers=(-n 2 --dist loadfile --no-loadscope-reorder); fi
    run_stage tests .venv/bin/python -m pytest -rs --durations=25 --durations-min=5 "${workers[@]}" "${selection[@]}" "$@"
fi

printf '\n'
printf '%s\n' "${summary[@]}"
exit "$failed"
