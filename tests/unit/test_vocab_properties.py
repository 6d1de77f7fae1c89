"""Properties of the vocabulary kernels over random shapes, shard splits, temperatures and extreme logits."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_reheat.parallel import vocab_kernels
from megatron_reheat.parallel.divergence import Comparison
from megatron_reheat.parallel.vocab import Question
from megatron_reheat.parallel.vocab_kernels import merge, shard_sums, write_gradient
from megatron_reheat.parallel.vocab_triton import INTERPRETED
from tests.reference import NearlyCertain, dense_divergence, dense_kl, dense_logprobs, relative_error

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


@st.composite
def pairs(draw) -> tuple[Tensor, Tensor, list[int], float]:
    vocab = draw(st.one_of(st.integers(1, 40), st.integers(1, LARGEST_VOCAB // 4)))
    num_tokens = draw(st.integers(0, 2 if vocab > 1000 else 6))
    kinds = [draw(st.sampled_from(["gaussian", "one_hot", "equal", "offset", "wide"])) for _ in range(2)]
    logits, others = (make_logits(kind, num_tokens, vocab, draw(st.integers(0, 1000))) for kind in kinds)
    if draw(st.booleans()):  # nearly equal
        others = logits + draw(st.sampled_from([1e-4, 1e-2, 0.3])) * others.sin()
    if draw(st.booleans()):
        logits[:, vocab // 2 + 1 :] = others[:, vocab // 2 + 1 :] = -torch.inf
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    cuts = sorted(draw(st.lists(st.integers(0, vocab), max_size=3)))
    return logits.to(dtype), others.to(dtype), [0, *cuts, vocab], draw(st.floats(0.5, 5.0))


def evaluate_pair(
    logits: Tensor, others: Tensor, borders: list[int], comparison: Comparison, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """What the ranks of a group compute, shard by shard; (divergence, gradient of the whole vocabulary)."""
    shards = [(slice(a, b), logits[:, a:b], others[:, a:b]) for a, b in itertools.pairwise(borders)]
    scalars = comparison.normalized(torch.stack([comparison.normalizing_sums(z, u) for _, z, u in shards]))
    sums = torch.stack([comparison.shard_sums(z, u, scalars) for _, z, u in shards])
    value, scalars = comparison.settled(sums, scalars)
    whole = torch.empty(logits.shape)
    for columns, z, u in shards:
        comparison.write_gradient(whole[:, columns], z, u, scalars, factor)
    return value, whole


@settings(max_examples=EXAMPLES // 2, deadline=None, derandomize=True)
@given(pairs(), st.sampled_from(["forward", "reverse", "js"]))
def test_divergences_of_any_shard_split_equal_the_dense_reference(pair, measure):
    logits, others, borders, temperature = pair
    comparison, ones = Comparison(measure, temperature), torch.ones(len(logits))
    value, gradient = evaluate_pair(logits, others, borders, comparison, ones)
    expected = dense_divergence(*(w.double().clamp_min(-1e5) for w in (logits, others)), measure, temperature, ones)
    assert (value >= 0).all() and (measure != "js" or (value <= math.log(2)).all())
    torch.testing.assert_close(value, expected.value, rtol=1e-5, atol=1e-12)
    assert relative_error(gradient, expected.gradient) < GRADIENT_TOLERANCE
    # a softmax does not see what is added to all logits
    assert gradient.double().sum(-1).abs().le(1e-5 / min(temperature, 1)).all()
    if measure == "js":
        swapped, _ = evaluate_pair(others, logits, borders, comparison, ones)
        torch.testing.assert_close(swapped, value, rtol=1e-5, atol=1e-12)
    itself, nothing = evaluate_pair(logits, logits, borders, comparison, ones)
    assert itself.eq(0).all() and nothing.eq(0).all()


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


@pytest.mark.parametrize(
    ("borders", "temperature"),
    [
        ([0, 4000, 4000, 9000], 1.2),
        *(([0, 9000], temperature) for temperature in ([1.2] if INTERPRETED else [0.7, 1.0, 1.02, 1.2])),
        *(([0, 151_936], temperature) for temperature in ([] if INTERPRETED else [1.0, 1.2])),  # compiled
    ],
)
def test_nearly_certain_policies_keep_their_digits(borders, temperature):
    """Column by column, relative to each exact value: 1 - p, entropies and gradients down to 1e-12."""
    rows = NearlyCertain.make(borders[-1])
    if borders[-1] > 100_000 and vocab_kernels._plan(rows.logits).sums is vocab_kernels._sums:
        pytest.skip("torch.compile does not work here: it needs a C++ compiler")
    ones, worst = torch.ones(len(rows.logits)), {}

    def compare(name: str, actual: float, expected: float) -> None:
        if abs(expected) > 1e-36:  # above float32's smallest numbers
            worst[name] = max(worst.get(name, 0.0), abs(actual / expected - 1))

    for target in (0, 1):
        exact = [rows.exact(i, target, temperature) for i in range(len(ones))]
        asked = {
            "logprob": (Question("logprobs", temperature), (ones, None)),
            "entropy": (Question("logprobs", temperature), (None, ones)),
            "forward": (Question("forward", temperature), (ones, None)),
            "reverse": (Question("reverse", temperature), (ones, None)),
        }
        for name, (question, gradients) in asked.items():
            if name != "logprob" and (target or (temperature == 1 and name != "entropy")):
                continue  # seen with the first target; there is no KL at temperature 1
            answers, gradient = evaluate(rows.logits, borders, rows.columns[:, target], question, gradients)
            for i, (e, columns) in enumerate(zip(exact, rows.columns, strict=True)):
                compare(name, answers[name == "entropy"][i].item(), getattr(e, name))
                if name == "forward":
                    compare("teacher_entropy", answers[2][i].item(), e.teacher_entropy)
                for kind, column in enumerate(columns):
                    compare(f"{name}_gradient", gradient[i, column].item(), getattr(e, f"{name}_gradient")[kind])
    # a KL is second order in 1 - 1/T: what float32 exponentials leave of its value, not of its gradient
    limits = {"forward": 1e-4, "reverse": 1e-4}
    assert {name: error for name, error in worst.items() if not error < limits.get(name, 1e-5)} == {}


def test_the_exact_reference_agrees_with_autograd_where_float64_suffices():
    rows = NearlyCertain.make(5001)
    reference = dense_kl(rows.logits[:1], 1.2, "forward", torch.ones(1))
    exact = rows.exact(0, 0, 1.2)
    assert exact.forward == pytest.approx(reference.kl.item(), rel=1e-9)
    assert exact.forward_gradient == pytest.approx(reference.gradient[0, rows.columns[0]].tolist(), rel=1e-9, abs=1e-30)
    logprobs = dense_logprobs(rows.logits[:1], rows.columns[:1, 1], 1.2, entropy_weight=0.0)
    assert exact.entropy == pytest.approx(logprobs.entropy.item(), rel=1e-9)
    sampled = rows.exact(0, 1, 1.2)
    assert sampled.logprob == pytest.approx(logprobs.logprobs.item(), rel=1e-9)
    assert sampled.logprob_gradient == pytest.approx(
        logprobs.gradient[0, rows.columns[0]].tolist(), rel=1e-9, abs=1e-30
    )


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
