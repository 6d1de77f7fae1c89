"""The Triton kernels without a GPU: their arithmetic in Triton's interpreter, and their compilation for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_reheat.parallel import pair_triton, vocab_triton

triton = pytest.importorskip("triton", reason="triton is not installed: pip install triton")

HERE = Path(__file__).parent
SHARED_TESTS = ("test_tempered_kl.py", "test_fused_head.py", "test_vocab_properties.py", "test_divergence.py")
# runs pytest in this very process, so that the calls that reach the kernels are counted
PROGRAM = """
import sys, pytest
from megatron_reheat.parallel import pair_triton, vocab_triton
kernels = [(m, n) for m, names in ((vocab_triton, ("shard_sums", "write_gradient")),
                                   (pair_triton, ("pair_sums", "write_gradient"))) for n in names]
reached = {}
for module, name in kernels:
    key = f"{module.__name__}.{name}"
    reached[key] = 0
    def counted(*args, kernel=getattr(module, name), key=key, **kwargs):
        reached[key] += 1
        return kernel(*args, **kwargs)
    setattr(module, name, counted)
status = pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]])
print(reached)
sys.exit(status or min(reached.values()) < 100)
"""


@pytest.mark.slow
def test_the_kernels_pass_every_test_of_the_plain_backend():
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *(str(HERE / name) for name in SHARED_TESTS)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("kernel", "constants"),
    [
        (vocab_triton._shard_sums_kernel, {"HAS_TARGETS": True, "TEMPERED": True}),
        (vocab_triton._gradient_kernel, {"HAS_TARGET": True, "HAS_ENTROPY": True, "HAS_CONTRAST": True}),
        *((pair_triton._pair_sums_kernel, {"IS_JS": is_js}) for is_js in (False, True)),
        *(
            (pair_triton._pair_gradient_kernel, {"IS_FORWARD": measure == "forward", "IS_JS": measure == "js"})
            for measure in ("forward", "reverse", "js")
        ),
    ],
    ids=["shard_sums", "gradient", "kl_sums", "js_sums", "forward_gradient", "reverse_gradient", "js_gradient"],
)
def test_the_kernels_compile_for_hopper(kernel, constants, dtype):
    """To machine code, which needs no GPU: the interpreter accepts programs that the compiler refuses."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.fn.arg_names
    types = {
        "logits": f"*{dtype}",
        "others": f"*{dtype}",
        "targets": "*i64",
        "rows": "*fp32",
        "inverse_temperature": "fp32",
        "flattening": "fp32",
        "out": "*fp64" if "sums" in kernel.fn.__name__ else f"*{dtype}",
    }
    constants = {**constants, "BLOCK": 4096}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    positions = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel.fn, signature=signature, constexprs=positions)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert len(compiled.asm["cubin"]) > 1000
