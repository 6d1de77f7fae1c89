"""What only a GPU can show. Skipped, with the reason, where there is none."""

from __future__ import annotations

import pytest
import torch

from megatron_reheat.losses import fused_tempered_kl, tempered_kl, vocab_logprobs
from megatron_reheat.model.backend import choose_backend
from megatron_reheat.parallel import cpu
from tests.reference import LOGIT_CASES, dense_kl, dense_logprobs, make_logits, relative_error

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", LOGIT_CASES)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_tempered_kl_on_the_device_matches_the_dense_reference(case, direction, dtype):
    """At Qwen3's vocabulary, where a sum has 151,936 terms."""
    logits = make_logits(case, 6, 151_936).to("cuda", dtype).requires_grad_()
    weights = torch.linspace(0.5, 1.5, 6, device="cuda")
    expected = dense_kl(logits, 1.2, direction, weights)
    result = tempered_kl(logits, temperature=1.2, direction=direction)
    (result.kl * weights).sum().backward()
    assert relative_error(result.entropy, expected.entropy) < 1e-5
    assert relative_error(result.kl, expected.kl) < 1e-4
    assert relative_error(logits.grad, expected.gradient) < (1e-5 if dtype == torch.float32 else 4e-3)


def test_logprobs_on_the_device_match_the_dense_reference():
    logits = make_logits("sharp", 6, 151_936).cuda().requires_grad_()
    targets = torch.arange(6, device="cuda") * 25_000
    expected = dense_logprobs(logits, targets, 0.9, entropy_weight=0.3)
    result = vocab_logprobs(logits, targets, temperature=0.9)
    (result.logprobs.sum() + 0.3 * result.entropy.sum()).backward()
    assert relative_error(result.logprobs, expected.logprobs) < 1e-5
    assert relative_error(logits.grad, expected.gradient) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_fused_head_on_the_device_matches_the_dense_reference(dtype):
    """In bfloat16, too, the logits are float32: the entropy is exact."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 256, generator=generator).to("cuda", dtype).requires_grad_()
    weight = (torch.randn(151_936, 256, generator=generator) / 4).to("cuda", dtype).requires_grad_()
    expected = dense_kl(hidden.detach().double() @ weight.detach().double().t(), 1.2, "forward", torch.ones(40).cuda())
    result = fused_tempered_kl(hidden, weight, temperature=1.2, chunk_tokens=16)
    result.kl.sum().backward()
    # float32 matrix products may run in TF32, whose logits are exact to three digits
    assert relative_error(result.entropy, expected.entropy) < 1e-3
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-3
    assert relative_error(hidden.grad, expected.gradient @ weight.detach().double()) < tolerance
    assert relative_error(weight.grad, expected.gradient.t() @ hidden.detach().double()) < tolerance


def test_the_cpu_backend_stays_out_of_the_way():
    assert cpu.install() is False
    assert torch.ones(1).cuda().is_cuda


def test_the_backend_names_what_it_chose():
    assert "Transformer Engine" in str(choose_backend("auto")) or "SDPA" in str(choose_backend("auto"))
