#!/usr/bin/env bash
# Makes the GPU environment in .venv/ at the project root, in the order in which the parts need each other.
#
#   bash scripts/setup_gpu.sh              # 20 to 60 minutes: Transformer Engine and Apex are compiled
#   SKIP_APEX=1 bash scripts/setup_gpu.sh  # Apex is optional: faster AdamW and weight gradients
#
# Version matrix (vLLM pins torch; Megatron-Core's metadata bounds Transformer Engine):
#   python 3.11-3.13 | torch 2.13.0 | megatron-core 0.16.1 | transformer-engine >=2.9,<2.12 | vllm 0.32.0 | apex from source
#   driver and nvcc: of the CUDA major version that torch was built with (printed below)
# Run on a node with a GPU, with nvcc, git and a C++ compiler on the PATH (on most clusters: module load cuda).
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH=2.13.0 MEGATRON=0.16.1 VLLM=0.32.0
TRANSFORMER_ENGINE='>=2.9,<2.12'
APEX_SOURCE=${APEX_SOURCE:-https://github.com/NVIDIA/apex}   # or a local clone
PYTHON=${PYTHON:-python3}
VENV=.venv

say() { printf '[gpu setup %4ss] %s\n' "$SECONDS" "$*"; }
fail() { printf '[gpu setup] error: %s\n' "$*" >&2; exit 1; }
need() { command -v "$1" >/dev/null || fail "$1 is not on the PATH; $2"; }
in_venv() { "$VENV/bin/python" "$@"; }
pip_install() {
    say "pip install $*"
    in_venv -m pip install --no-input --progress-bar off "$@" || fail "pip install $* failed"
}
check() { in_venv -c "$2" || fail "$1"; }

need nvidia-smi "run this on a node with a GPU and its driver"
need nvcc "load the CUDA toolkit (module load cuda)"
need git "install it"
need g++ "install a C++ compiler, or load one (module load gcc)"
"$PYTHON" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
    fail "$PYTHON is not Python 3.11 to 3.13 with venv; name one: PYTHON=/path/to/python3.12 bash $0"
[[ ! -e $VENV/reheat-root ]] || fail "$VENV/ is the CPU environment of scripts/setup_env.sh; move it away first"

[[ -x $VENV/bin/python ]] || "$PYTHON" -m venv "$VENV"
pip_install --upgrade pip setuptools wheel ninja packaging 'pybind11[global]'

pip_install "torch==$TORCH"
check "torch $TORCH sees no GPU: the driver is too old for its CUDA, or pip chose a CPU build" \
    'import torch; assert torch.cuda.is_available(); print("torch", torch.__version__, "CUDA", torch.version.cuda)'
CUDA=$(in_venv -c 'import torch; print(torch.version.cuda.split(".")[0])')
NVCC=$(nvcc --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p')
[[ $NVCC == "$CUDA" ]] || fail "nvcc is CUDA $NVCC, torch was built with CUDA $CUDA; load that toolkit (module avail cuda)"

pip_install "megatron-core==$MEGATRON"
# compiled against the torch just installed, hence no build isolation
pip_install --no-build-isolation "transformer-engine[pytorch,core_cu$CUDA]$TRANSFORMER_ENGINE"
check "Transformer Engine is installed but does not import; see the error above" 'import transformer_engine.pytorch'

if [[ -n ${SKIP_APEX:-} ]]; then
    say "Apex: skipped"
elif in_venv -c 'import torch, amp_C, fused_weight_gradient_mlp_cuda' 2>/dev/null; then
    say "Apex: already there"
else
    BUILD=$(mktemp -d)
    trap 'rm -rf "$BUILD"' EXIT
    git clone --depth 1 "$APEX_SOURCE" "$BUILD/apex" ||
        fail "cannot clone $APEX_SOURCE; set APEX_SOURCE to a clone, or SKIP_APEX=1"
    APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip_install --no-build-isolation "$BUILD/apex"
    check "Apex was built without its CUDA extensions; see the log above, or set SKIP_APEX=1" \
        'import torch, amp_C, fused_weight_gradient_mlp_cuda'
fi

pip_install "vllm==$VLLM"
check "vLLM replaced torch $TORCH, so what was compiled against it no longer fits: remove $VENV/ and start again" \
    "import torch; assert torch.__version__.split('+')[0] == '$TORCH', torch.__version__"
pip_install --editable ".[dev]"
"$VENV/bin/reheat" doctor || fail "reheat doctor found something essential missing"
say "done; activate with: source $VENV/bin/activate, then: pytest -m gpu tests/gpu"
