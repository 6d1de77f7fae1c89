"""The CPU backend: what it changes, one by one, and that a machine with CUDA never sees it. Each test in its own process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forks import start_fork

BEHAVIOURS = {
    "current_device": "assert torch.cuda.current_device() == torch.device('cpu')",
    "synchronize": "torch.cuda.synchronize()",
    "current_stream": "torch.cuda.current_stream()",
    "rng_state": """
state = torch.cuda.get_rng_state()
first = torch.rand(3)
torch.cuda.set_rng_state(state)
assert torch.equal(first, torch.rand(3))
""",
    "manual_seed": """
torch.cuda.manual_seed(7)
first = torch.rand(3)
torch.cuda.manual_seed(7)
assert torch.equal(first, torch.rand(3))
""",
    "tensor_cuda": "x = torch.ones(2); assert x.cuda() is x",
    # a tensor that is made again finds its memory where the last one left it: no page is handed out anew
    "kept_memory": """
import resource
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(16 << 20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
# a small allocation in between may take a corner of the freed block, so that the next one is fresh; not every time
again = min(faults() for _ in range(5))
assert again < 1000, f"{again} pages of 16384"
""",
    "megatron_rng_tracker": """
# Megatron's tracker forks named random states; without the patch its restore never runs and both draws continue one stream
from megatron.core.tensor_parallel import random as R
R._set_cuda_rng_state(torch.Generator().manual_seed(3).get_state())
a = torch.rand(2)
R._set_cuda_rng_state(torch.Generator().manual_seed(3).get_state())
assert torch.equal(a, torch.rand(2))
""",
    "literals": """
import importlib
left = []
for name in cpu.CUDA_LITERAL_MODULES:
    module = importlib.import_module(name)
    left += [f.__qualname__ for f in cpu._functions_of(module, name) if cpu._retarget_code(f.__code__) is not f.__code__]
assert not left, left
""",
    "literals_in_use": """
# Megatron's default causal mask is made with device='cuda'
from megatron.core.transformer.utils import get_default_causal_mask
assert get_default_causal_mask(3).device.type == 'cpu'
""",
    "gradient_norm": """
# clip_grads names torch.cuda.FloatTensor and device 'cuda'
import torch.distributed as dist
dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
norm = get_grad_norm_fp32([torch.tensor([3.0, 4.0])], grad_stats_parallel_group=dist.group.WORLD)
assert abs(norm - 5.0) < 1e-6, norm
""",
    "second_install": "assert cpu.install() is True",
}


@pytest.fixture
def run(tmp_path: Path):
    """Executes code in a fork that has Megatron imported and no backend installed; returns what it printed when it failed."""

    def run(code: str) -> str | None:
        process = start_fork(exec, code, {}, log=tmp_path / "log.txt")
        process.join(120)
        return None if process.exitcode == 0 else (tmp_path / "log.txt").read_text()

    return run


def test_installed_behaviours(run):
    """One process for all behaviours; each is reported by name."""
    checks = "\n".join(
        f"try:\n    exec({code!r}, dict(torch=torch, cpu=cpu))\n"
        f"except BaseException as error:\n    failures.append(({name!r}, repr(error)))"
        for name, code in BEHAVIOURS.items()
    )
    error = run(
        "import torch\nfrom megatron_reheat.parallel import cpu\nassert cpu.install() is True\nfailures = []\n"
        + checks
        + "\nassert not failures, failures"
    )
    assert error is None, error


@pytest.mark.parametrize("name", ["current_device", "tensor_cuda", "literals", "kept_memory", "megatron_rng_tracker"])
def test_behaviours_need_the_backend(run, name):
    """The same checks fail without it, so the test above can fail."""
    code = f"import torch\nfrom megatron_reheat.parallel import cpu\nexec({BEHAVIOURS[name]!r}, dict(torch=torch, cpu=cpu))"
    assert run(code) is not None


def test_not_installed_where_cuda_is_present(run):
    error = run(
        "import torch\n"
        "torch.cuda.is_available = lambda: True\n"  # simulated: this is all the backend looks at
        "before = {n: getattr(torch.cuda, n) for n in ('current_device', 'synchronize', 'get_rng_state', 'manual_seed')}\n"
        "tensor_cuda = torch.Tensor.cuda\n"
        "import megatron.core.optimizer.clip_grads as clip_grads\n"
        "code = clip_grads.get_grad_norm_fp32.__code__\n"
        "from megatron_reheat.parallel import cpu\n"
        "assert cpu.install() is False\n"
        "assert all(getattr(torch.cuda, n) is f for n, f in before.items())\n"
        "assert torch.Tensor.cuda is tensor_cuda and clip_grads.get_grad_norm_fp32.__code__ is code\n"
    )
    assert error is None, error


def test_a_megatron_without_the_expected_literal_is_refused(run):
    error = run(
        "from megatron_reheat.parallel import cpu\n"
        "cpu.CUDA_LITERAL_MODULES = ('megatron.core.enums',)\n"
        "try:\n    cpu.install()\n"
        "except RuntimeError as error:\n    assert 'no CUDA literal found in megatron.core.enums' in str(error)\n"
        "else:\n    raise SystemExit('not refused')\n"
    )
    assert error is None, error
