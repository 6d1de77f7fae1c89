"""Divergences between two distributions, and the entropy flow: values and gradients against dense references, unsharded."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from megatron_reheat.parallel.vocab import VocabHead, VocabLogits, Vocabulary
from megatron_reheat.parallel.vocab_triton import INTERPRETED
from tests.reference import (
    LOGIT_CASES,
    dense_divergence,
    dense_entropy_flow,
    dense_logprobs,
    exact_divergence,
    make_logits,
    relative_error,
)

MEASURES = ["forward", "reverse", "js"]
NUM_TOKENS, HIDDEN, VOCAB = 3, 16, 101
# half a unit in the last place of bfloat16; Triton's interpreter cuts it off instead of rounding
BFLOAT16_ERROR = 8e-3 if INTERPRETED else 4e-3


def divergence(own: Vocabulary, other: Vocabulary, measure: str, temperature: float = 1.0) -> Tensor:
    if measure == "js":
        return own.js_to(other, temperature=temperature)
    return own.kl_to(other, direction=measure, temperature=temperature)


def of_logits(logits: Tensor, others: Tensor, measure: str, temperature: float = 1.0) -> Tensor:
    size = logits.size(-1)
    return divergence(VocabLogits(logits, size), VocabLogits(others, size), measure, temperature)


def norm_error(actual: Tensor, expected: list[float]) -> float:
    exact = torch.tensor(expected, dtype=torch.float64)
    return ((actual.double() - exact).norm() / exact.norm()).item()


CASES = [*zip(LOGIT_CASES, LOGIT_CASES, strict=True), *zip(LOGIT_CASES, LOGIT_CASES[1:] + LOGIT_CASES[:1], strict=True)]


@pytest.mark.parametrize("form", ["logits", "logits that may be overwritten", "head"])
def test_a_flattened_prediction_is_that_of_divided_logits(form):
    hidden, weight = make_logits(LOGIT_CASES[0], NUM_TOKENS, HIDDEN), make_logits(LOGIT_CASES[0], VOCAB, HIDDEN, seed=2)
    logits = hidden @ weight.t()
    expected = VocabLogits(logits / 1.5, VOCAB).logprobs(torch.arange(NUM_TOKENS))
    if form == "head":
        given: Vocabulary = VocabHead(hidden.requires_grad_(), weight.requires_grad_(), VOCAB)
    else:
        given = VocabLogits(logits.clone().requires_grad_(), VOCAB, overwrite="may" in form)
    found = given.flattened(1.5).logprobs(torch.arange(NUM_TOKENS))
    assert not found.logprobs.requires_grad
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
    if isinstance(given, VocabLogits):
        assert torch.equal(given.logits.detach(), logits) is ("may" not in form)


@pytest.mark.parametrize(("case", "other_case"), CASES)
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_divergences_match_the_dense_reference(case, other_case, measure, dtype):
    logits = make_logits(case, NUM_TOKENS, VOCAB).to(dtype).requires_grad_()
    others = make_logits(other_case, NUM_TOKENS, VOCAB, seed=5).to(dtype).requires_grad_()
    weights = torch.rand(NUM_TOKENS, generator=torch.Generator().manual_seed(1)) + 0.5
    for temperature in (1.0, 1.6) if dtype == torch.float32 else (1.3,):
        logits.grad = None
        expected = dense_divergence(logits, others, measure, temperature, weights)
        value = of_logits(logits, others, measure, temperature)
        (value * weights).sum().backward()
        assert value.dtype == torch.float32
        assert relative_error(value, expected.value) < 2e-6
        assert logits.grad is not None and logits.grad.dtype == dtype and others.grad is None
        assert relative_error(logits.grad, expected.gradient) < (1e-5 if dtype == torch.float32 else BFLOAT16_ERROR)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("distance", [1e-5, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_nearly_equal_distributions_keep_their_digits(measure, distance, offset):
    """A KL of 1e-13 nats, row by row: the difference of two sums would be 1e-8 or nothing."""
    generator = torch.Generator().manual_seed(3)
    others = torch.randn(3, 60, generator=generator) * torch.tensor([[1.0], [3.0], [12.0]])
    logits = (others + distance * torch.randn(3, 60, generator=generator) + offset).requires_grad_()
    value = of_logits(logits, others, measure, 1.3)
    value.sum().backward()
    for row in range(3):
        expected, gradient = exact_divergence(logits[row], others[row], measure, 1.3)
        # the normalizers' rounding, 3e-8, enters squared
        assert value[row].item() == pytest.approx(expected, rel=3e-6, abs=1e-15), row
        assert norm_error(logits.grad[row], gradient) < 1e-6, row


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_nearly_certain_policies_keep_their_digits(measure, temperature):
    """Entry by entry: 1 - p down to 1e-12, against teachers that agree, are surer still, or are certain of something else."""
    others = torch.zeros(12, 40)
    logits = torch.zeros(12, 40)
    rows = torch.arange(4)
    logits[torch.arange(12), 3] = torch.tensor([8.0, 14.0, 20.0, 28.0]).repeat(3)
    others[rows, 3], others[rows + 4, 3], others[rows + 8, 9] = 9.0, 30.0, 15.0
    logits[:, 4] = 1.5
    logits.requires_grad_()
    value = of_logits(logits, others, measure, temperature)
    value.sum().backward()
    for row in range(12):
        expected, gradient = exact_divergence(logits[row], others[row], measure, temperature)
        assert value[row].item() == pytest.approx(expected, rel=3e-6), row
        assert logits.grad[row].tolist() == pytest.approx(gradient, rel=3e-5), row


@pytest.mark.parametrize("measure", MEASURES)
def test_float64_logits_are_compared_in_float64(measure):
    logits, others = torch.randn(2, 5, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[4] = others[4] + 1e-5 * logits[4]
    logits.requires_grad_()
    expected = dense_divergence(logits, others, measure, 0.9, torch.ones(5))
    value = of_logits(logits, others, measure, 0.9)
    (gradient,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
    torch.testing.assert_close(value, expected.value, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(gradient, expected.gradient, rtol=1e-10, atol=1e-15)
    far = logits[:4].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: of_logits(z, others[:4], measure, 0.9), (far,))


@pytest.mark.parametrize("case", LOGIT_CASES)
@pytest.mark.parametrize("measure", MEASURES)
def test_a_distribution_is_no_distance_from_itself(case, measure):
    logits = make_logits(case, NUM_TOKENS, VOCAB).requires_grad_()
    vocab = VocabLogits(logits, VOCAB)
    value = divergence(vocab, vocab, measure, 0.8)
    value.sum().backward()
    assert value.eq(0).all() and logits.grad.eq(0).all()


@pytest.mark.parametrize("measure", MEASURES)
def test_tokens_that_both_exclude_do_not_count(measure):
    finite, others = torch.randn(2, 3, 10)
    masked, masked_others = (
        torch.cat([w, torch.full((3, 4), -torch.inf)], -1).requires_grad_() for w in (finite, others)
    )
    expected = dense_divergence(finite, others, measure, 1.0, torch.ones(3))
    value = of_logits(masked, masked_others, measure)
    value.sum().backward()
    torch.testing.assert_close(value.double(), expected.value, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(masked.grad[:, :10].double(), expected.gradient, rtol=1e-5, atol=1e-7)
    assert masked.grad[:, 10:].eq(0).all()


@pytest.mark.parametrize("who", ["policy", "teacher"])
@pytest.mark.parametrize("column", ["top", "low"])
def test_a_token_that_only_one_excludes(who, column):
    """One KL is infinite, and says so in value and gradient; the other and Jensen-Shannon are what they are."""
    logits, others = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))
    excluding, allowing = (logits, others) if who == "policy" else (others, logits)
    excluded = allowing.argmax(-1) if column == "top" else allowing.argmin(-1)
    excluding[torch.arange(3), excluded] = -torch.inf
    logits.requires_grad_()
    infinite = "forward" if who == "policy" else "reverse"
    value = of_logits(logits, others, infinite)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.eq(torch.inf).all() and not gradient.isfinite().any(-1).all()
    for measure in set(MEASURES) - {infinite}:
        value = of_logits(logits, others, measure)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        for row in range(3):
            # the definition has 0 x infinity where the limit is 0
            exact, exact_gradient = exact_divergence(
                logits[row].detach().clamp_min(-200), others[row].clamp_min(-200), measure, 1.0
            )
            assert value[row].item() == pytest.approx(exact, rel=2e-6)
            assert norm_error(gradient[row], exact_gradient) < 1e-6


def test_js_of_disjoint_distributions_is_ln_2():
    logits, others = torch.full((1, 8), -torch.inf), torch.full((1, 8), -torch.inf)
    logits[:, :4], others[:, 4:] = 1.0, 1.0
    assert of_logits(logits, others, "js").item() == pytest.approx(0.6931471805599453, rel=1e-7)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_stays_visible(measure, side):
    pair = torch.randn(2, 2, 9)
    pair[side, 0, 5] = torch.nan
    value = of_logits(*pair, measure)
    assert value[0].isnan() and value[1].isfinite()


@pytest.mark.parametrize("measure", MEASURES)
def test_padded_columns_take_no_probability(measure):
    logits, others = torch.randn(2, 3, 12)
    expected = of_logits(logits[:, :10], others[:, :10], measure)
    logits[:, 10:], others[:, 10:] = 50.0, 40.0
    logits.requires_grad_()
    value = divergence(VocabLogits(logits, 10), VocabLogits(others, 10), measure)
    value.sum().backward()
    assert torch.equal(value, expected)
    assert logits.grad[:, 10:].eq(0).all() and logits.grad[:, :10].ne(0).any()


def test_leading_dimensions_and_no_tokens():
    logits, others = torch.randn(2, 4, 3, 11)
    value = of_logits(logits.transpose(0, 1), others.transpose(0, 1), "reverse")
    assert torch.equal(value, of_logits(logits, others, "reverse").t())
    empty = torch.zeros(0, 9, requires_grad=True)
    value = of_logits(empty, empty.detach(), "js")
    value.sum().backward()
    assert value.shape == (0,) and value.dtype == torch.float32


def test_what_cannot_be_compared_is_refused():
    vocab = VocabLogits(torch.zeros(3, 8), 8)
    with pytest.raises(ValueError, match=r"different shapes.*\(3, 8, 8\), \(2, 8, 8\)"):
        vocab.kl_to(VocabLogits(torch.zeros(2, 8), 8))
    with pytest.raises(ValueError, match=r"\(3, 8, 8\), \(3, 8, 7\)"):
        vocab.js_to(VocabLogits(torch.zeros(3, 8), 7))
    with pytest.raises(ValueError, match="'forward' or 'reverse', not 'js'"):
        vocab.kl_to(vocab, direction="js")
    with pytest.raises(ValueError, match="temperature must be positive, not 0"):
        vocab.js_to(vocab, temperature=0.0)


# -- forms ---------------------------------------------------------------------------------------------------------------


def heads(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two hidden states of different sizes and their weights."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(11, HIDDEN), (VOCAB, HIDDEN), (11, 10), (VOCAB, 10)]
    hidden, weight, others, other_weight = (torch.randn(size, generator=generator) for size in sizes)
    return hidden.requires_grad_(), weight.requires_grad_(), others, other_weight


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("forms", ["head-head", "head-logits", "logits-head"])
def test_every_form_gives_the_same(measure, masked, forms):
    hidden, weight, others, other_weight = heads()
    mask = torch.arange(11) % 3 > 0 if masked else torch.ones(11, dtype=torch.bool)
    weights = torch.rand(11) * mask
    expected = dense_divergence(hidden @ weight.t(), others @ other_weight.t(), measure, 1.4, weights)
    own: Vocabulary = VocabHead(hidden, weight, VOCAB, mask=mask if masked else None, chunk_tokens=5)
    other: Vocabulary = VocabHead(others, other_weight, VOCAB, chunk_tokens=4)
    if forms == "head-logits":
        other = VocabLogits(others @ other_weight.t(), VOCAB)
    elif forms == "logits-head":
        own = VocabLogits(hidden @ weight.t(), VOCAB)
    value = divergence(own, other, measure, 1.4)
    (value * weights).sum().backward()
    assert relative_error(value[mask], expected.value[mask]) < 1e-5
    if masked and forms != "logits-head":
        assert value[~mask].eq(0).all()
    assert relative_error(hidden.grad, expected.gradient @ weight.detach().double()) < 1e-5
    assert relative_error(weight.grad, expected.gradient.t() @ hidden.detach().double()) < 1e-5


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_several_questions_to_logits_that_may_be_overwritten(order):
    """In any order, one of them with these very logits as the teacher's: the last one to read them overwrites them."""
    logits = make_logits("gaussian", NUM_TOKENS, VOCAB).requires_grad_()
    tap = make_logits("sharp", NUM_TOKENS, VOCAB, seed=4).requires_grad_()
    targets = torch.arange(NUM_TOKENS)
    ones = torch.ones(NUM_TOKENS)
    expected = dense_logprobs(logits, targets, 1.0, entropy_weight=0.0).gradient
    expected = expected + dense_divergence(logits, tap, "reverse", 2.0, ones).gradient
    expected_tap = dense_divergence(tap, logits, "js", 1.0, ones).gradient

    copies = [z.detach().clone().requires_grad_() for z in (logits, tap)]
    policy, layer = (VocabLogits(z, VOCAB, overwrite=True) for z in copies)
    questions = [
        lambda: policy.logprobs(targets).logprobs,
        lambda: layer.js_to(policy),
        lambda: policy.kl_to(layer, temperature=2.0),
    ]
    value = sum(questions[i]().sum() for i in order)
    gradient, gradient_tap = torch.autograd.grad(value, copies)
    assert relative_error(gradient, expected) < 1e-5
    assert relative_error(gradient_tap, expected_tap) < 1e-5
    if order == (0, 1, 2):  # backward comes in reverse order: the first question of each was the last to read it
        assert not torch.equal(copies[0], logits) and not torch.equal(copies[1], tap)


def test_logits_that_were_overwritten_are_no_teacher():
    logits, others = torch.randn(2, 3, 7)
    others = others.requires_grad_() * 1.0
    logits.requires_grad_()
    value = VocabLogits(logits, 7).kl_to(VocabLogits(others, 7)).sum()
    VocabLogits(others, 7, overwrite=True).logprobs(torch.zeros(3, dtype=torch.long)).logprobs.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


# -- entropy flow --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LOGIT_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_the_mean_entropy_flow_matches_the_dense_reference(case, dtype):
    logits = make_logits(case, NUM_TOKENS, VOCAB).to(dtype).requires_grad_()
    flow = VocabLogits(logits, VOCAB).mean_entropy_flow()
    assert not flow.requires_grad and flow.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(flow, dense_entropy_flow(logits.detach())) < 2e-6
    head = VocabHead(logits.detach(), torch.eye(VOCAB, dtype=dtype), VOCAB, chunk_tokens=3)
    assert torch.equal(head.mean_entropy_flow(), flow)


def test_the_flow_predicts_how_a_policy_gradient_step_changes_the_entropy():
    logits = torch.randn(5, 30, dtype=torch.float64)
    targets = torch.tensor([0, 3, 8, 20, 29])
    vocab = VocabLogits(logits, 30)
    logprobs, entropy = vocab.logprobs(targets)
    predicted = -(logprobs.exp() * (logprobs + entropy) - vocab.mean_entropy_flow())
    step = 1e-6 * (torch.nn.functional.one_hot(targets, 30) - logits.softmax(-1))
    changed = [VocabLogits(logits + sign * step, 30).logprobs(targets).entropy for sign in (1, -1)]
    torch.testing.assert_close(predicted, (changed[0] - changed[1]) / 2e-6, rtol=1e-6, atol=1e-9)


# -- compiled code -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter takes every call")
@pytest.mark.parametrize("measure", MEASURES)
def test_large_vocabularies_go_through_compiled_code(measure, monkeypatch):
    from megatron_reheat.parallel import pair_kernels, vocab_kernels

    if vocab_kernels._compiled() is None:
        pytest.skip("torch.compile does not work here: it needs a C++ compiler")
    compiled, calls = pair_kernels._compiled, []
    monkeypatch.setattr(pair_kernels, "_compiled", lambda function: calls.append(function) or compiled(function))
    others = torch.cat([make_logits(case, 10, 151_936, seed=1) for case in ("gaussian", "sharp", "one_hot")])
    logits = others + torch.cat([d * torch.randn(10, 151_936) for d in (1e-5, 0.3, 4.0)])
    logits.requires_grad_()
    ones = torch.ones(len(logits))
    expected = dense_divergence(logits, others, measure, 1.0, ones)
    value = of_logits(logits, others, measure)
    value.sum().backward()
    assert len(calls) == 2
    assert relative_error(value, expected.value) < 1e-5
    for row in range(len(logits)):
        assert relative_error(logits.grad[row] * 1e3, expected.gradient[row] * 1e3) < 1e-5, row
