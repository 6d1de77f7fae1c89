"""The vocabulary losses against a dense float64 reference, values and gradients, unsharded."""

import pytest
import torch
from torch import Tensor

from megatron_reheat.losses import tempered_kl, vocab_entropy, vocab_logprobs
from megatron_reheat.parallel import vocab_kernels
from megatron_reheat.parallel.vocab_triton import INTERPRETED
from tests.reference import LOGIT_CASES, TEMPERATURES, dense_kl, dense_logprobs, make_logits, relative_error

NUM_TOKENS, VOCAB = 7, 101
# half a unit in the last place of bfloat16; Triton's interpreter cuts it off instead of rounding
BFLOAT16_ERROR = 8e-3 if INTERPRETED else 4e-3


@pytest.mark.parametrize("case", LOGIT_CASES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_tempered_kl_matches_dense_reference(case, temperature, direction, dtype):
    logits = make_logits(case, NUM_TOKENS, VOCAB).to(dtype).requires_grad_()
    weights = torch.rand(NUM_TOKENS, generator=torch.Generator().manual_seed(1)) + 0.5
    expected = dense_kl(logits, temperature, direction, weights)

    result = tempered_kl(logits, temperature=temperature, direction=direction)
    (result.kl * weights).sum().backward()

    assert result.kl.dtype == torch.float32
    # the value is second order in 1 - 1/T, so float32 exponentials leave fewer digits of it than of the gradient
    assert relative_error(result.kl, expected.kl) < 1e-4
    assert relative_error(result.entropy, expected.entropy) < 2e-6
    assert relative_error(result.teacher_entropy, expected.teacher_entropy) < 2e-6
    assert logits.grad is not None and logits.grad.dtype == dtype
    assert relative_error(logits.grad, expected.gradient) < (1e-5 if dtype == torch.float32 else BFLOAT16_ERROR)


@pytest.mark.parametrize("case", LOGIT_CASES)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.2])
def test_logprobs_and_entropy_match_dense_reference(case, temperature):
    logits = make_logits(case, NUM_TOKENS, VOCAB).requires_grad_()
    targets = torch.randint(VOCAB, (NUM_TOKENS,), generator=torch.Generator().manual_seed(2))
    targets[0] = logits[0].argmax()  # a nearly certain target is where 1 - p cancels
    expected = dense_logprobs(logits, targets, temperature, entropy_weight=0.3)

    result = vocab_logprobs(logits, targets, temperature=temperature)
    (result.logprobs.sum() + 0.3 * result.entropy.sum()).backward()

    assert relative_error(result.logprobs, expected.logprobs) < 2e-6
    assert relative_error(result.entropy, expected.entropy) < 2e-6
    assert relative_error(logits.grad, expected.gradient) < 1e-5


def test_gradients_of_sharp_rows_are_right_row_by_row():
    """A norm over all rows would hide the rows that matter: entropies of 1e-6 nats, where q - p_T cancels."""
    logits = torch.zeros(4, 50)
    logits[torch.arange(4), torch.arange(4)] = torch.tensor([5.0, 10.0, 15.0, 20.0])
    logits.requires_grad_()
    expected = dense_kl(logits, 1.2, "forward", torch.ones(4))
    tempered_kl(logits, temperature=1.2).kl.sum().backward()
    for row in range(4):
        assert relative_error(logits.grad[row], expected.gradient[row]) < 1e-5


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_double_precision_gradcheck(direction):
    logits = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)

    def at_detached_teacher(z: Tensor) -> Tensor:
        return tempered_kl(z, temperature=1.3, direction=direction).kl

    # the numerical derivative must hold the teacher still, which a detached teacher does only in backward;
    # so the check is against autograd of the dense form with an explicit constant teacher
    expected = dense_kl(logits, 1.3, direction, torch.ones(3, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(at_detached_teacher(logits).sum(), logits)
    assert relative_error(gradient, expected.gradient) < 1e-12
    assert torch.autograd.gradcheck(lambda z: vocab_entropy(z), (logits,))
    assert torch.autograd.gradcheck(
        lambda z: vocab_logprobs(z, torch.tensor([0, 5, 10]), temperature=0.7)[0], (logits,)
    )


def test_reverse_kl_gradient_is_the_scaled_entropy_gradient():
    logits = torch.randn(5, 40, requires_grad=True)
    (kl_gradient,) = torch.autograd.grad(tempered_kl(logits, temperature=1.2, direction="reverse").kl.sum(), logits)
    (entropy_gradient,) = torch.autograd.grad(vocab_entropy(logits).sum(), logits)
    assert relative_error(kl_gradient, -(1 - 1 / 1.2) * entropy_gradient) < 1e-5


def test_minus_infinity_logits_take_no_probability():
    finite = torch.randn(3, 10)
    masked = torch.cat([finite, torch.full((3, 4), -torch.inf)], -1).requires_grad_()
    expected = tempered_kl(finite, temperature=1.2)
    result = tempered_kl(masked, temperature=1.2)
    result.kl.sum().backward()
    torch.testing.assert_close(result.kl, expected.kl)
    torch.testing.assert_close(result.entropy, expected.entropy)
    assert masked.grad[:, 10:].eq(0).all() and masked.grad.isfinite().all()


def test_padded_columns_take_no_probability():
    logits = torch.randn(3, 12)
    logits[:, 10:] = 50.0  # would dominate if it counted
    logits.requires_grad_()
    expected = tempered_kl(logits.detach()[:, :10], temperature=2.0)
    result = tempered_kl(logits, temperature=2.0, vocab_size=10)
    result.kl.sum().backward()
    torch.testing.assert_close(result.kl.detach(), expected.kl)
    assert logits.grad[:, 10:].eq(0).all() and logits.grad[:, :10].ne(0).any()


def test_nan_logits_stay_visible():
    logits = torch.randn(2, 8)
    logits[0, 3] = torch.nan
    result = tempered_kl(logits, temperature=1.2)
    assert result.kl[0].isnan() and result.entropy[0].isnan()
    assert result.kl[1].isfinite()


def test_no_tokens_gives_no_values():
    result = tempered_kl(torch.zeros(0, 9, requires_grad=True), temperature=1.2)
    assert result.kl.shape == (0,)


def test_leading_dimensions_and_views_are_kept():
    storage = torch.randn(4, 2, 3, 30)
    logits = storage[..., ::2].transpose(0, 1)
    result = tempered_kl(logits, temperature=1.5, targets=torch.zeros(2, 4, 3, dtype=torch.long))
    assert result.kl.shape == (2, 4, 3)
    torch.testing.assert_close(result.kl[1, 2], tempered_kl(storage[2, 1, :, ::2], temperature=1.5).kl)
    torch.testing.assert_close(result.logprobs, logits.log_softmax(-1)[..., 0], atol=1e-6, rtol=1e-6)


def test_unknown_direction_is_refused():
    with pytest.raises(ValueError, match="'forward' or 'reverse', not 'sideways'"):
        tempered_kl(torch.zeros(1, 4), temperature=1.2, direction="sideways")


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter takes every call")
@pytest.mark.parametrize(("direction", "columns"), [("forward", 151_936), ("reverse", 151_936), ("forward", 151_939)])
def test_large_vocabularies_go_through_compiled_code(direction, columns, monkeypatch):
    """The sums are taken four columns at a time, and what is left over, where here the policy's best tokens are."""
    logits = make_logits("sharp", 28, columns)
    logits[:, -3:] = logits.amax(-1, keepdim=True) - torch.tensor([0.0, 0.5, 0.0])
    logits.requires_grad_()
    weights = torch.rand(28) + 0.5
    expected = dense_kl(logits, 1.2, direction, weights)
    compiled = vocab_kernels._compiled()
    if compiled is None:
        pytest.skip("torch.compile does not work here: it needs a C++ compiler")
    calls = []
    counted = tuple(lambda *args, f=function: calls.append(f) or f(*args) for function in compiled)
    monkeypatch.setattr(vocab_kernels, "_compiled", lambda: counted)
    result = tempered_kl(logits, temperature=1.2, direction=direction)
    (result.kl * weights).sum().backward()
    assert set(calls) == set(compiled)
    assert relative_error(result.kl, expected.kl) < 1e-4
    assert relative_error(result.entropy, expected.entropy) < 2e-6
    assert relative_error(logits.grad, expected.gradient) < 1e-5
