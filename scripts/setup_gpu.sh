#!/usr/bin/env bash
# Makes the GPU environment in .venv/ at the project root, in the order in which the parts need each other.
#
#   bash scripts/setup_gpu.sh              # on a machine with a GPU and network: 20 to 60 minutes, because
#                                          # Transformer Engine and Apex are compiled
#   bash scripts/setup_gpu.sh fetch        # on a login node, with network and nvcc, without a GPU: everything but compiling
#   bash scripts/setup_gpu.sh build        # then on a compute node that sees the same folder: compiles, without network
#   SKIP_APEX=1 bash scripts/setup_gpu.sh  # Apex is optional: faster AdamW and weight gradients
#   ARCHITECTURES='8.0;9.0' NO_GPU=1 ...   # builds for GPUs that are not there, as in a container's build
#
# Versions stand in megatron_reheat/versions.py. What is compiled needs nvcc of the CUDA version that torch was built with (printed
# below), git and a C++ compiler on the PATH; on most clusters: module load cuda gcc.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
APEX_SOURCE=${APEX_SOURCE:-https://github.com/NVIDIA/apex}   # or a local clone
VENV=.venv
SOURCES=$VENV/gpu-sources   # what `build` compiles

say() { printf '[gpu setup %4ss] %s\n' "$SECONDS" "$*"; }
fail() { printf '[gpu setup] error: %s\n' "$*" >&2; exit 1; }
need() { command -v "$1" >/dev/null || fail "$1 is not on the PATH; $2"; }
in_venv() { "$VENV/bin/python" "$@"; }
pip_do() {
    say "pip $*"
    in_venv -m pip --no-input "$1" --progress-bar off "${@:2}" || fail "pip $* failed"
}
check() { in_venv -c "$2" || fail "$1"; }

STEP=${1:-all}
[[ $STEP == all || $STEP == fetch || $STEP == build ]] || fail "$STEP is not a step; there are fetch, build, or nothing for both"
"$PYTHON" megatron_reheat/versions.py >/dev/null || fail "$PYTHON does not run; name another: PYTHON=/path/to/python3.12 bash $0"
eval "$("$PYTHON" megatron_reheat/versions.py)"

# Before anything that takes long. $1 is the CUDA version of torch, major.minor.
check_toolkit() {
    local nvcc
    need nvcc "load the CUDA toolkit $1 (module load cuda/$1)"
    need g++ "install a C++ compiler, or load one (module load gcc)"
    nvcc=$(nvcc --version | sed -n 's/.*release \([0-9]*\.[0-9]*\).*/\1/p')
    [[ ${nvcc%%.*} == "${1%%.*}" ]] || fail "nvcc is CUDA $nvcc, torch was built with CUDA $1; load that toolkit (module avail cuda)"
    # Transformer Engine takes any minor version, Apex compares both and stops
    [[ $nvcc == "$1" || -n ${SKIP_APEX:-} ]] ||
        fail "nvcc is CUDA $nvcc, torch was built with CUDA $1, and Apex compiles with that alone; load it, or set SKIP_APEX=1"
}

fetch() {
    [[ -x ${CUDA_HOME:-/usr/local/cuda}/bin/nvcc ]] ||
        need nvcc "Transformer Engine's set-up asks for it even where nothing is compiled; load a CUDA toolkit here, too (module load cuda)"
    need git "install it"
    "$PYTHON" -c "import sys, venv; o, b = '$PYTHON_OLDEST'.split(), '$PYTHON_BELOW'.split()
sys.exit(not tuple(map(int, o)) <= sys.version_info[:2] < tuple(map(int, b)))" ||
        fail "$PYTHON is not Python ${PYTHON_OLDEST/ /.} to below ${PYTHON_BELOW/ /.} with venv; name one: PYTHON=/path/to/python3.12 bash $0"
    [[ ! -e $VENV/reheat-root ]] || fail "$VENV/ is the CPU environment of scripts/setup_env.sh; move it away first"
    [[ -x $VENV/bin/python ]] || "$PYTHON" -m venv "$VENV"
    pip_do install --upgrade pip setuptools wheel ninja cmake packaging 'pybind11[global]'
    pip_do install "torch==$TORCH"
    check "pip chose a CPU build of torch; point it at the default index" 'import torch; assert torch.version.cuda; print(
        "torch", torch.__version__, "CUDA", torch.version.cuda)'
    pip_do install "vllm==$VLLM"
    check "vLLM replaced torch $TORCH: remove $VENV/ and start again" \
        "import torch; assert torch.__version__.split('+')[0] == '$TORCH', torch.__version__"
    pip_do install "megatron-core==$MEGATRON_CORE"
    pip_do install --editable ".[dev]"
    mkdir -p "$SOURCES"
    # the sources of what is compiled, with the wheels that they ask for, torch among them; their own set-up wants the torch just
    # installed
    pip_do download --no-build-isolation --dest "$SOURCES" "torch==$TORCH" "transformer-engine[pytorch,core_cu$(cuda_major)]$TRANSFORMER_ENGINE_RANGE"
    if [[ -z ${SKIP_APEX:-} && ! -d $SOURCES/apex ]]; then
        git clone --depth 1 "$APEX_SOURCE" "$SOURCES/apex" ||
            fail "cannot clone $APEX_SOURCE; set APEX_SOURCE to a clone, or SKIP_APEX=1"
    fi
    say "fetched; on a node with a GPU: bash scripts/setup_gpu.sh build"
}

cuda_major() { in_venv -c 'import torch; print(torch.version.cuda.split(".")[0])'; }

build() {
    [[ -d $SOURCES ]] || fail "there is nothing to build in $SOURCES; first, where there is network: bash scripts/setup_gpu.sh fetch"
    check_toolkit "$(in_venv -c 'import torch; print(torch.version.cuda)')"
    if [[ -z ${NO_GPU:-} ]]; then
        need nvidia-smi "run this on a node with a GPU and its driver, or set NO_GPU=1 and ARCHITECTURES"
        check "torch $TORCH sees no GPU: the driver is too old for its CUDA" 'import torch; assert torch.cuda.is_available()'
    else
        [[ -n ${ARCHITECTURES:-} ]] || fail "NO_GPU=1 needs ARCHITECTURES, the compute capabilities to build for, as '8.0;9.0'"
        export TORCH_CUDA_ARCH_LIST=$ARCHITECTURES NVTE_CUDA_ARCHS=${ARCHITECTURES//./}
    fi
    # cuDNN's and NCCL's headers and libraries lie in the wheels that torch brought; a CUDA toolkit has neither
    local library place
    for library in nccl cudnn; do
        place=$(in_venv -c "import nvidia.$library; print(nvidia.$library.__path__[0])") || fail "torch brought no nvidia-$library wheel"
        export CPATH="$place/include${CPATH:+:$CPATH}" LIBRARY_PATH="$place/lib${LIBRARY_PATH:+:$LIBRARY_PATH}"
    done
    export CUDNN_PATH=$place
    pip_do install --no-build-isolation --no-index --find-links "$SOURCES" \
        "transformer-engine[pytorch,core_cu$(cuda_major)]$TRANSFORMER_ENGINE_RANGE"
    [[ -n ${NO_GPU:-} ]] ||
        check "Transformer Engine is installed but does not import; see the error above" 'import transformer_engine.pytorch'
    if [[ -n ${SKIP_APEX:-} ]]; then
        say "Apex: skipped"
    elif in_venv -c 'import torch, amp_C, fused_weight_gradient_mlp_cuda' 2>/dev/null; then
        say "Apex: already there"
    else
        APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip_do install --no-build-isolation --no-index "$SOURCES/apex"
        check "Apex was built without its CUDA extensions; see the log above, or set SKIP_APEX=1" \
            'import torch, amp_C, fused_weight_gradient_mlp_cuda'
    fi
    [[ -n ${NO_GPU:-} ]] || "$VENV/bin/reheat" doctor || fail "reheat doctor found something essential missing"
    say "done; activate with: source $VENV/bin/activate, then: pytest -m gpu tests/gpu"
}

if [[ $STEP == all ]]; then
    # torch's CUDA version is known only when it is there; that there is a toolkit at all can be said at once
    need nvcc "load the CUDA toolkit (module load cuda)"
    need g++ "install a C++ compiler, or load one (module load gcc)"
fi
[[ $STEP == build ]] || fetch
[[ $STEP == fetch ]] || build
