#!/usr/bin/env bash
# The paper's comparison with the control it lacks: DAPO until the entropy collapses, then several arms with equally many steps.
#
#   bash examples/qwen3_4b/run.sh                                  # arms: ts_opsd control
#   bash examples/qwen3_4b/run.sh ts_opsd reverse_kl rollout_temperature control
#   MODEL=/models/Qwen3-4B-Base STEPS_AFTER=300 bash examples/qwen3_4b/run.sh
#
# One node of 8 x 80 GB. A run that was cut short continues: start this again. Ctrl-C and SIGTERM are for the run it is in.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

SIZE=${SIZE:-4b}
MODEL=${MODEL:-Qwen/Qwen3-${SIZE^^}-Base}
STEPS_AFTER=${STEPS_AFTER:-200}
ARMS=("$@")
((${#ARMS[@]})) || ARMS=(ts_opsd control)
RUNS=runs/qwen3_$SIZE

# In a process group of its own and waited for, so that a signal to this script reaches the run, once.
run=
for signal in HUP INT TERM; do trap "pass_on $signal" "$signal"; done
pass_on() {
    if [[ -n $run ]]; then
        kill -"$1" -- "-$run" 2>/dev/null || true
    else
        trap - "$1"
        kill -"$1" $$
    fi
}
run_reheat() {
    local status
    set -m
    reheat "$@" &
    run=$!
    set +m
    while status=0; wait "$run" || status=$?; kill -0 "$run" 2>/dev/null; do :; done  # a signal ends `wait` early
    run=
    return "$status"
}

for arm in trunk "${ARMS[@]}"; do
    [[ -f yaml/qwen3_${SIZE}_$arm.yaml ]] || { echo "no recipe yaml/qwen3_${SIZE}_$arm.yaml" >&2; exit 1; }
done
run_reheat check "yaml/qwen3_${SIZE}_ts_opsd.yaml" "model.hf_path=$MODEL"
run_reheat train "yaml/qwen3_${SIZE}_trunk.yaml" "model.hf_path=$MODEL"
TRUNK=$(python -c "from megatron_reheat.run_folder import read_metrics; print(read_metrics('$RUNS/trunk')[-1]['step'])")
for arm in "${ARMS[@]}"; do
    run_reheat train "yaml/qwen3_${SIZE}_$arm.yaml" "model.hf_path=$MODEL" "run.folder=$RUNS/arms/{name}" \
        "run.fork_from=$RUNS/trunk" "run.steps=$((TRUNK + STEPS_AFTER))"
done
run_reheat report "${ARMS[@]/#/$RUNS/arms/}" --out "$RUNS/report"
