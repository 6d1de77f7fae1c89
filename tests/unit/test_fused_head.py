"""The fused head against the logits form: the same values and gradients, and never more than a chunk of logits."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_reheat.losses import fused_logprobs, fused_tempered_kl, tempered_kl, vocab_logprobs
from megatron_reheat.parallel.head_loss import head_loss
from megatron_reheat.parallel.vocab import VocabHead, VocabLogits, Vocabulary
from megatron_reheat.parallel.vocab_triton import INTERPRETED
from scripts.storage_counter import StorageCounter
from tests.reference import dense_kl, dense_logprobs, relative_error

NUM_TOKENS, HIDDEN, VOCAB = 23, 16, 101


def inputs(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(NUM_TOKENS, HIDDEN, generator=generator) * scale).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCAB, (NUM_TOKENS,), generator=generator)


def dense_gradients(hidden: Tensor, weight: Tensor, logits_gradient: Tensor) -> tuple[Tensor, Tensor]:
    return logits_gradient @ weight.detach().double(), logits_gradient.t() @ hidden.detach().double()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
def test_tempered_kl_matches_the_dense_reference(direction, scale, chunk_tokens):
    hidden, weight, targets = inputs(scale=scale)
    weights = torch.rand(NUM_TOKENS) + 0.5
    logits = hidden.detach().double() @ weight.detach().double().t()
    expected = dense_kl(logits, 1.2, direction, weights)

    result = fused_tempered_kl(
        hidden, weight, temperature=1.2, direction=direction, targets=targets, chunk_tokens=chunk_tokens
    )
    (result.kl * weights).sum().backward()

    assert relative_error(result.kl, expected.kl) < 1e-4
    assert relative_error(result.entropy, expected.entropy) < 1e-5
    assert relative_error(result.teacher_entropy, expected.teacher_entropy) < 1e-5
    assert relative_error(result.logprobs, logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]) < 1e-5
    grad_hidden, grad_weight = dense_gradients(hidden, weight, expected.gradient)
    # float32 logits of size 60 are exact to 4e-6 only
    assert relative_error(hidden.grad, grad_hidden) < 1e-5 * max(1.0, scale)
    assert relative_error(weight.grad, grad_weight) < 1e-5 * max(1.0, scale)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.2])
def test_logprobs_match_the_dense_reference(temperature):
    hidden, weight, targets = inputs()
    logits = hidden.detach().double() @ weight.detach().double().t()
    expected = dense_logprobs(logits, targets, temperature, entropy_weight=0.3)
    result = fused_logprobs(hidden, weight, targets, temperature=temperature, chunk_tokens=7)
    (result.logprobs.sum() + 0.3 * result.entropy.sum()).backward()
    assert relative_error(result.logprobs, expected.logprobs) < 1e-5
    grad_hidden, grad_weight = dense_gradients(hidden, weight, expected.gradient)
    assert relative_error(hidden.grad, grad_hidden) < 1e-5
    assert relative_error(weight.grad, grad_weight) < 1e-5


def test_bfloat16_weights_give_float32_logits():
    """Rounding logits to bfloat16 would shift the entropy of a sharp policy by several per cent."""
    hidden, weight, _ = inputs(torch.bfloat16, scale=3.0)
    exact = hidden.detach().double() @ weight.detach().double().t()
    expected = dense_kl(exact, 1.2, "forward", torch.ones(NUM_TOKENS))
    result = fused_tempered_kl(hidden, weight, temperature=1.2)
    result.kl.sum().backward()
    assert relative_error(result.entropy, expected.entropy) < 1e-5
    grad_hidden, grad_weight = dense_gradients(hidden, weight, expected.gradient)
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert relative_error(hidden.grad, grad_hidden) < 1e-2
    assert relative_error(weight.grad, grad_weight) < 1e-2
    rounded = tempered_kl(hidden.detach() @ weight.detach().t(), temperature=1.2)
    assert relative_error(rounded.entropy, expected.entropy) > 1e-3


def test_masked_positions_are_zero_and_cost_nothing():
    hidden, weight, targets = inputs()
    mask = torch.arange(NUM_TOKENS) % 3 == 0
    poisoned = torch.where(mask[:, None], hidden.detach(), torch.nan).requires_grad_()
    result = fused_logprobs(poisoned, weight, targets, mask=mask)
    result.logprobs.sum().backward()
    kept = hidden.detach()[mask].requires_grad_()
    expected = fused_logprobs(kept, weight.detach(), targets[mask])
    expected.logprobs.sum().backward()
    assert result.logprobs[~mask].eq(0).all() and torch.equal(result.logprobs[mask], expected.logprobs)
    assert poisoned.grad[~mask].eq(0).all() and torch.equal(poisoned.grad[mask], kept.grad)


@pytest.mark.parametrize("mask", [None, torch.zeros(4, dtype=torch.bool)], ids=["no tokens", "nothing counted"])
def test_nothing_to_count_gives_zero_gradients(mask):
    hidden = torch.randn(0 if mask is None else 4, HIDDEN, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, requires_grad=True)
    result = fused_tempered_kl(hidden, weight, temperature=1.2, mask=mask)
    result.kl.sum().backward()
    assert result.kl.shape == hidden.shape[:1]
    assert hidden.grad.eq(0).all() and weight.grad.eq(0).all()


def test_padded_rows_of_the_weight_take_no_probability():
    hidden, weight, _ = inputs()
    padded = torch.cat([weight.detach(), torch.full((3, HIDDEN), 9.0)]).requires_grad_()
    result = fused_tempered_kl(hidden, padded, temperature=2.0, vocab_size=VOCAB)
    expected = fused_tempered_kl(hidden.detach(), weight.detach(), temperature=2.0)
    result.kl.sum().backward()
    torch.testing.assert_close(result.kl, expected.kl)
    assert padded.grad[VOCAB:].eq(0).all() and padded.grad[:VOCAB].ne(0).any()


def test_the_weights_gradient_goes_into_megatrons_buffer_where_there_is_one():
    hidden, weight, _ = inputs(torch.bfloat16)
    fused_tempered_kl(hidden, weight, temperature=1.2, chunk_tokens=4).kl.sum().backward()
    buffered = weight.detach().clone().requires_grad_()
    buffered.main_grad = torch.ones(VOCAB, HIDDEN)
    for _ in range(2):
        fused_tempered_kl(hidden.detach(), buffered, temperature=1.2, chunk_tokens=4).kl.sum().backward()
    assert buffered.grad is None
    assert relative_error((buffered.main_grad - 1) / 2, weight.grad) < 4e-3


def test_a_second_backward_pass_through_overwritten_logits_is_refused():
    logits = torch.randn(3, 7, requires_grad=True)
    overwritten = logits * 1.0
    targets = torch.zeros(3, dtype=torch.long)
    (expected,) = torch.autograd.grad(vocab_logprobs(logits, targets).logprobs.sum(), logits)
    first = vocab_logprobs(overwritten, targets, overwrite_logits=True).logprobs.sum()
    second = vocab_logprobs(overwritten, targets, overwrite_logits=True).logprobs.sum()
    (gradient,) = torch.autograd.grad(first, logits, retain_graph=True)
    assert torch.equal(gradient, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


def _kl_answers(hidden, weight):
    return fused_tempered_kl(hidden, weight, temperature=1.2, chunk_tokens=32).kl.sum()


def _kl_with_the_loss(hidden, weight):
    def loss(vocabs, rows):
        return vocabs[0].tempered_kl(temperature=1.2, direction="forward").kl.sum()

    return head_loss([hidden], weight, loss, weight.size(0), chunk_tokens=32)


def _kl_to_a_teacher(hidden, weight):
    teacher = VocabHead(hidden.detach() + 1, weight, weight.size(0), chunk_tokens=32)
    return VocabHead(hidden, weight, weight.size(0), chunk_tokens=32).kl_to(teacher).sum()


def _js_with_the_loss(hidden, weight):
    def loss(vocabs, rows):
        return vocabs[0].js_to(vocabs[1]).sum()

    return head_loss([hidden, hidden.detach() + 1], weight, loss, weight.size(0), chunk_tokens=32)


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter makes copies of its own")
@pytest.mark.parametrize("form", [_kl_answers, _kl_with_the_loss, _kl_to_a_teacher, _js_with_the_loss])
def test_one_chunk_of_logits_exists_at_a_time(form):
    chunk_bytes = 32 * 4096 * 4
    peaks = {}
    for num_tokens in (32, 512):
        hidden = torch.randn(num_tokens, 8, requires_grad=True)
        weight = torch.randn(4096, 8, requires_grad=True)
        counter = StorageCounter()
        counter.ignore(hidden, weight)
        with counter:
            form(hidden, weight).backward()
        peaks[num_tokens] = counter.peak
    # what grows is the gradient of the hidden states and a few numbers per token
    assert peaks[512] - peaks[32] < chunk_bytes / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_loss_taken_chunk_by_chunk_has_the_same_value_and_gradients(dtype):
    weights = torch.rand(NUM_TOKENS) + 0.5
    hidden, weight, targets = inputs(dtype)
    result = fused_logprobs(hidden, weight, targets, temperature=0.8)
    expected = (weights * (result.logprobs.exp() + 0.1 * result.entropy)).sum()
    (3 * expected).backward()
    again, weight_again, _ = inputs(dtype)

    def loss(vocabs: Sequence[VocabLogits], rows: slice) -> Tensor:
        logprobs, entropy = vocabs[0].logprobs(targets[rows], temperature=0.8)
        return (weights[rows] * (logprobs.exp() + 0.1 * entropy)).sum()

    value = head_loss([again], weight_again, loss, VOCAB, chunk_tokens=5)
    (3 * value).backward()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    assert relative_error(again.grad, hidden.grad) < tolerance
    assert relative_error(weight_again.grad, weight.grad) < tolerance


def test_a_scaled_loss_is_refused_where_the_gradient_is_in_megatrons_buffer():
    hidden, weight, targets = inputs()

    def loss(vocabs: Sequence[VocabLogits], rows: slice) -> Tensor:
        return vocabs[0].logprobs(targets[rows]).logprobs.sum()

    head_loss([hidden], weight, loss, VOCAB, chunk_tokens=5).backward()
    buffered = weight.detach().clone().requires_grad_()
    buffered.main_grad = torch.zeros(VOCAB, HIDDEN)
    head_loss([hidden.detach().requires_grad_()], buffered, loss, VOCAB, chunk_tokens=5).backward()
    assert buffered.grad is None
    assert relative_error(buffered.main_grad, weight.grad) < 1e-6
    with pytest.raises(RuntimeError, match="must not be scaled"):
        (2 * head_loss([hidden], buffered, loss, VOCAB)).backward()


def three_states(num_tokens: int = NUM_TOKENS) -> tuple[list[Tensor], Tensor, Tensor]:
    """The policy's hidden states, a layer's, a privileged teacher's; the head's weight with two rows of padding; targets."""
    generator = torch.Generator().manual_seed(1)
    policy, layer, teacher = torch.randn(3, num_tokens, HIDDEN, generator=generator)
    weight = torch.cat([torch.randn(VOCAB, HIDDEN, generator=generator), torch.full((2, HIDDEN), 9.0)])
    targets = torch.randint(VOCAB, (num_tokens,), generator=generator)
    return [policy.requires_grad_(), layer.requires_grad_(), teacher], weight.requires_grad_(), targets


def dense_loss_of_three(states: list[Tensor], weight: Tensor, targets: Tensor) -> list[Tensor]:
    """The value and its gradients, for the policy's, the layer's and the weight's, by autograd in float64."""
    policy, layer, head = (w.detach().double().requires_grad_() for w in (*states[:2], weight))
    valid = head[:VOCAB]
    log_p, log_layer = ((h @ valid.t()).log_softmax(-1) for h in (policy, layer))
    teacher = (states[2].double() @ valid.detach().t()).log_softmax(-1)
    log_mean = torch.logaddexp(log_layer, log_p.detach()) - math.log(2)
    js = (log_layer.exp() * (log_layer - log_mean) + log_p.detach().exp() * (log_p.detach() - log_mean)).sum() / 2
    value = js + (log_p.exp() * (log_p - teacher)).sum() - log_p.gather(-1, targets[:, None]).sum()
    value.backward()
    return [value.detach(), policy.grad, layer.grad, head.grad]


@pytest.mark.parametrize(("chunk_tokens", "has_main_grad"), [(1, False), (6, True), (1000, False)])
def test_a_loss_of_several_hidden_states(chunk_tokens, has_main_grad):
    states, weight, targets = three_states()
    expected = dense_loss_of_three(states, weight, targets)
    if has_main_grad:
        weight.main_grad = torch.zeros_like(weight)

    def loss(vocabs: Sequence[VocabLogits], rows: slice) -> Tensor:
        policy, layer, teacher = vocabs
        logprobs = policy.logprobs(targets[rows]).logprobs
        return (layer.js_to(policy) + policy.kl_to(teacher) - logprobs).sum()

    value = head_loss(states, weight, loss, VOCAB, chunk_tokens=chunk_tokens)
    value.backward()
    weight_grad = weight.main_grad if has_main_grad else weight.grad
    for actual, exact in zip((value, states[0].grad, states[1].grad, weight_grad), expected, strict=True):
        assert relative_error(actual, exact) < 1e-5
    assert states[2].grad is None


def test_hidden_states_that_the_loss_does_not_look_at_have_no_gradient():
    states, weight, targets = three_states()

    def loss(vocabs: Sequence[VocabLogits], rows: slice) -> Tensor:
        return vocabs[0].logprobs(targets[rows]).logprobs.sum()

    head_loss(states, weight, loss, VOCAB, chunk_tokens=9).backward()
    gradients = states[0].grad, weight.grad
    states[0].grad = weight.grad = None
    head_loss(states[:1], weight, loss, VOCAB, chunk_tokens=9).backward()
    assert states[1].grad.eq(0).all()
    assert torch.equal(states[0].grad, gradients[0]) and torch.equal(weight.grad, gradients[1])


def test_hidden_states_of_different_lengths_are_refused():
    states, weight, _ = three_states()
    with pytest.raises(ValueError, match=r"different shapes: \[\(23, 16\), \(22, 16\)\]"):
        head_loss([states[0], states[1][1:]], weight, lambda vocabs, rows: vocabs[0].logits.sum(), VOCAB)


@settings(max_examples=8 if INTERPRETED else 40, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 14), st.floats(0.3, 3.0), st.sampled_from(["forward", "reverse", "js"]))
def test_logits_heads_and_chunks_agree(num_tokens, chunk_tokens, temperature, measure):
    states, weight, _ = three_states(num_tokens)

    def divergence(own: Vocabulary, other: Vocabulary) -> Tensor:
        if measure == "js":
            return own.js_to(other, temperature=temperature)
        return own.kl_to(other, direction=measure, temperature=temperature)

    def from_logits() -> Tensor:
        return divergence(*(VocabLogits(h @ weight.t(), VOCAB) for h in states[1:])).sum()

    def from_heads() -> Tensor:
        return divergence(*(VocabHead(h, weight, VOCAB, chunk_tokens=chunk_tokens) for h in states[1:])).sum()

    def with_the_loss() -> Tensor:
        return head_loss(
            states[1:], weight, lambda vocabs, _: divergence(*vocabs).sum(), VOCAB, chunk_tokens=chunk_tokens
        )

    values = [form() for form in (from_logits, from_heads, with_the_loss)]
    expected, *others = ((value, *torch.autograd.grad(value, states[1])) for value in values)
    for value, gradient in others:
        torch.testing.assert_close(value, expected[0], rtol=1e-5, atol=1e-7)
        assert relative_error(gradient, expected[1]) < 1e-5
