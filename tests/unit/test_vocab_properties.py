"""Properties of the vocabulary kernels over random shapes, shard splits, temperatures and extreme logits."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_reheat.parallel.vocab import Question
from megatron_reheat.parallel.vocab_kernels import merge, shard_sums, write_gradient
from megatron_reheat.parallel.vocab_triton import INTERPRETED
from tests.reference import dense_kl, dense_logprobs, relative_error

# the interpreter takes each program of a kernel for a walk through NumPy
EXAMPLES, LARGEST_VOCAB = (25, 20_000) if INTERPRETED else (120, 200_000)
# float32 differences of nearly equal exponentials lose digits where the teacher hardly differs from the policy
GRADIENT_TOLERANCE = 1e-5


def make_logits(kind: str, num_tokens: int, vocab: int, seed: int) -> Tensor:
    logits = torch.randn(num_tokens, vocab, generator=torch.Generator().manual_seed(seed))
    match kind:
        case "one_hot":
            logits[:, seed % vocab] = 25.0
        case "equal":
            logits = torch.full((num_tokens, vocab), 3.0)
        case "offset":
            logits = (logits * 3 + 1e4).round(decimals=2)
        case "minus_infinity":
            logits[:, vocab // 2 + 1 :] = -torch.inf
        case "wide":
            logits *= 15
    return logits


@st.composite
def problems(draw) -> tuple[Tensor, list[int], Tensor, float]:
    vocab = draw(st.one_of(st.integers(1, 40), st.integers(1, LARGEST_VOCAB)))
    num_tokens = draw(st.integers(0, 3 if vocab > 1000 else 9))
    kind = draw(st.sampled_from(["gaussian", "one_hot", "equal", "offset", "minus_infinity", "wide"]))
    logits = make_logits(kind, num_tokens, vocab, draw(st.integers(0, 1000)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    cuts = sorted(draw(st.lists(st.integers(0, vocab), max_size=3)))  # a shard may be empty
    temperature = draw(st.floats(0.5, 5.0).filter(lambda t: abs(t - 1) > 0.01))
    # a target of zero probability has an infinite log-probability in the reference, too
    targets = torch.arange(num_tokens) * 7 % (vocab // 2 + 1)
    return logits.to(dtype), [0, *cuts, vocab], targets, temperature


def evaluate(logits: Tensor, borders: list[int], targets: Tensor, question: Question, gradients: tuple) -> tuple:
    """What the ranks of a group compute, shard by shard; (answers, gradient of the whole vocabulary)."""
    shards = [(first, logits[:, first:last]) for first, last in itertools.pairwise(borders)]
    sums = torch.stack([shard_sums(shard, targets - first, question.temperature) for first, shard in shards])
    scalars = merge(sums, question.temperature)
    whole = torch.empty(logits.shape)
    for first, shard in shards:
        out = whole[:, first : first + shard.size(1)]
        coefficients = question.coefficients(gradients)
        write_gradient(out, shard, targets - first, scalars, coefficients, question.temperature)
    return question.answers(scalars, torch.float32), whole


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(problems(), st.sampled_from(["forward", "reverse"]))
def test_tempered_kl_of_any_shard_split_equals_the_dense_reference(problem, direction):
    logits, borders, targets, temperature = problem
    ones = torch.ones(len(logits))
    reference = logits.double().clamp_min(-1e5)  # the definition has 0 x infinity where the closed form has 0
    expected = dense_kl(reference, temperature, direction, ones)
    answers, gradient = evaluate(logits, borders, targets, Question(direction, temperature), (ones, None))
    kl, entropy, teacher_entropy, _ = answers
    assert (kl >= 0).all()
    torch.testing.assert_close(kl.double(), expected.kl, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(entropy.double(), expected.entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(teacher_entropy.double(), expected.teacher_entropy, rtol=1e-5, atol=1e-6)
    assert relative_error(gradient, expected.gradient) < GRADIENT_TOLERANCE


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(problems())
def test_logprobs_of_any_shard_split_equal_the_dense_reference(problem):
    logits, borders, targets, temperature = problem
    ones = torch.ones(len(logits))
    reference = logits.double().clamp_min(-1e5)
    expected = dense_logprobs(reference, targets, temperature, entropy_weight=0.5)
    answers, gradient = evaluate(logits, borders, targets, Question("logprobs", temperature), (ones, 0.5 * ones))
    torch.testing.assert_close(answers[0].double(), expected.logprobs, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(answers[1].double(), expected.entropy, rtol=1e-5, atol=1e-6)
    assert relative_error(gradient, expected.gradient) < GRADIENT_TOLERANCE


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(problems())
def test_reverse_kl_is_the_entropy_bonus_scaled(problem):
    logits, borders, targets, temperature = problem
    ones = torch.ones(len(logits))
    _, reverse = evaluate(logits, borders, targets, Question("reverse", temperature), (ones, None))
    _, entropy = evaluate(logits, borders, targets, Question("logprobs", temperature), (None, ones))
    torch.testing.assert_close(reverse, -(1 - 1 / temperature) * entropy, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("what", ["logprobs", "forward", "reverse"])
def test_what_is_not_finite_stays_visible(bad, what):
    logits = torch.randn(2, 50)
    logits[0, 33] = bad
    answers, _ = evaluate(logits, [0, 20, 50], torch.tensor([4, 4]), Question(what, 1.2), (torch.ones(2), None))
    assert not answers[0][0].isfinite()
    assert answers[0][1].isfinite()


def test_gradient_may_replace_strided_logits_in_place():
    storage = torch.randn(5, 60)
    logits = storage[:, 7:50]
    targets = torch.tensor([0, 42, 5, -1, 43])
    question, ones = Question("logprobs", 1.3), torch.ones(5)
    scalars = merge(shard_sums(logits, targets, 1.3)[None], 1.3)
    expected = torch.empty(5, 43)
    coefficients = question.coefficients((ones, ones))
    write_gradient(expected, logits, targets, scalars, coefficients, 1.3)
    untouched = storage.clone()
    write_gradient(logits, logits, targets, scalars, coefficients, 1.3)
    assert torch.equal(logits, expected)
    assert torch.equal(storage[:, :7], untouched[:, :7]) and torch.equal(storage[:, 50:], untouched[:, 50:])
