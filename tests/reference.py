"""Dense float64 references, written from the definitions and differentiated by autograd; shared by unit and dist tests.

Float64 itself loses 1 - p and the entropy of a policy that is certain to 1e-12; `NearlyCertain` has 50 digits.
"""

import math
from decimal import Decimal, localcontext
from typing import NamedTuple

import torch
from torch import Tensor

TEMPERATURES = [0.8, 1.05, 1.2, 2.0, 5.0]
LOGIT_CASES = ["gaussian", "sharp", "one_hot", "flat", "offset"]


class DenseKL(NamedTuple):
    kl: Tensor
    entropy: Tensor
    teacher_entropy: Tensor
    gradient: Tensor


class DenseLogprobs(NamedTuple):
    logprobs: Tensor
    entropy: Tensor
    gradient: Tensor


def make_logits(case: str, num_tokens: int, vocab: int, seed: int = 0) -> Tensor:
    """[num_tokens, vocab] float32 logits of one kind."""
    logits = torch.randn(num_tokens, vocab, generator=torch.Generator().manual_seed(seed))
    match case:
        case "gaussian":
            return logits * 2
        case "sharp":
            return logits * 12
        case "one_hot":
            winners = torch.arange(num_tokens) * 13 % vocab
            return logits.index_put_((torch.arange(num_tokens), winners), torch.tensor(18.0))
        case "flat":
            return torch.zeros(num_tokens, vocab)
        case "offset":
            return logits * 2 + 1e4
    raise ValueError(case)


def dense_kl(logits: Tensor, temperature: float, direction: str, weights: Tensor) -> DenseKL:
    """Per-token KL and entropies, and the gradient of sum(weights * kl), from the definition."""
    z = logits.detach().double().requires_grad_()
    log_q = z.log_softmax(-1)
    log_p = (z.detach() / temperature).log_softmax(-1)
    first, second = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    kl = (first.exp() * (first - second)).sum(-1)
    (kl * weights.double()).sum().backward()
    entropy, teacher_entropy = (-(lp.exp() * lp).sum(-1).detach() for lp in (log_q, log_p))
    return DenseKL(kl.detach(), entropy, teacher_entropy, z.grad)


def dense_logprobs(logits: Tensor, targets: Tensor, temperature: float, entropy_weight: float) -> DenseLogprobs:
    """Log-probabilities of the targets, entropies, and the gradient of sum(logprobs) + entropy_weight * sum(entropy)."""
    z = logits.detach().double().requires_grad_()
    logprobs = (z / temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    log_q = z.log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum(-1)
    (logprobs.sum() + entropy_weight * entropy.sum()).backward()
    return DenseLogprobs(logprobs.detach(), entropy.detach(), z.grad)


class DenseDivergence(NamedTuple):
    value: Tensor
    gradient: Tensor


def dense_divergence(
    logits: Tensor, others: Tensor, measure: str, temperature: float, weights: Tensor
) -> DenseDivergence:
    """Per-token KL or Jensen-Shannon divergence to detached `others`, and the gradient of its weighted sum."""
    z = logits.detach().double().requires_grad_()
    log_p, log_q = ((w / temperature).log_softmax(-1) for w in (z, others.detach().double()))
    if measure == "js":
        log_mean = torch.logaddexp(log_p, log_q) - math.log(2)
        value = sum((w.exp() * (w - log_mean)).sum(-1) for w in (log_p, log_q)) / 2
    else:
        first, second = (log_q, log_p) if measure == "forward" else (log_p, log_q)
        value = (first.exp() * (first - second)).sum(-1)
    (value * weights.double()).sum().backward()
    return DenseDivergence(value.detach(), z.grad)


def exact_divergence(logits: Tensor, others: Tensor, measure: str, temperature: float) -> tuple[float, list[float]]:
    """The same of one row [V] with 50 digits."""
    with localcontext() as context:
        context.prec = 50
        t = Decimal(temperature)

        def softmax(row: Tensor) -> list[Decimal]:
            e = [(Decimal(v) / t).exp() for v in row.tolist()]
            total = sum(e)
            return [x / total for x in e]

        p, q = softmax(logits), softmax(others)
        mean = [(a + b) / 2 for a, b in zip(p, q, strict=True)]

        def kl(first: list[Decimal], second: list[Decimal]) -> Decimal:
            return sum((a * (a / b).ln() for a, b in zip(first, second, strict=True)), Decimal(0))

        match measure:
            case "forward":
                value, gradient = kl(q, p), [a - b for a, b in zip(p, q, strict=True)]
            case "reverse":
                value = kl(p, q)
                gradient = [a * ((a / b).ln() - value) for a, b in zip(p, q, strict=True)]
            case _:
                own = kl(p, mean)
                value = (own + kl(q, mean)) / 2
                gradient = [a * ((a / m).ln() - own) / 2 for a, m in zip(p, mean, strict=True)]
        return float(value), [float(g / t) for g in gradient]


def dense_entropy_flow(logits: Tensor) -> Tensor:
    log_q = logits.double().log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum(-1, keepdim=True)
    return ((2 * log_q).exp() * (log_q + entropy)).sum(-1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the reference; absolute below 1e-6, where the reference itself is zero."""
    difference = (actual.detach().double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-6)).item()


class Exact(NamedTuple):
    """Of one row, all as floats: answers by name, and gradients [3] with respect to one logit of each kind."""

    logprob: float
    entropy: float
    teacher_entropy: float
    forward: float
    reverse: float
    logprob_gradient: list[float]
    entropy_gradient: list[float]
    forward_gradient: list[float]
    reverse_gradient: list[float]


class NearlyCertain(NamedTuple):
    """Rows [N, V] whose top token has all but 10^-4 to 10^-12 of the probability; the rest is one runner-up's or everyone's.

    `columns` [N, 3] holds where the three kinds of logit stand: top, runner-up, any other.
    """

    logits: Tensor
    columns: Tensor

    @classmethod
    def make(cls, vocab: int) -> "NearlyCertain":
        rows, columns = [], []
        places = [(0, 1), (0, 4096), (vocab - 1, 7), (5000, 904), (4999, vocab - 1)]  # two share a lane of 4096
        for exponent in (4, 8, 12):
            for top, runner in places:
                for spread in (False, True):
                    share = torch.tensor(10.0**-exponent / (vocab - 1 if spread else 1)).log()
                    row = torch.full((vocab,), (9.0 + share).item() if spread else -70.0)
                    row[runner], row[top] = 9.0 + share, 9.0
                    rows.append(row)
                    columns.append([top, runner, next(v for v in range(vocab) if v not in (top, runner))])
        return cls(torch.stack(rows), torch.tensor(columns))

    def exact(self, row: int, target: int, temperature: float) -> Exact:
        """`target` is the kind of the sampled token; its log-probability is at `temperature`."""
        with localcontext() as context:
            context.prec = 50
            z = [Decimal(v) for v in self.logits[row, self.columns[row]].tolist()]
            counts, t = (1, 1, self.logits.size(1) - 2), Decimal(temperature)

            def softmax(values: list[Decimal]) -> tuple[list[Decimal], list[Decimal]]:
                e = [(v - z[0]).exp() for v in values]
                total = mean(e, [Decimal(1)] * 3)
                return [x / total for x in e], [v - z[0] - total.ln() for v in values]

            def mean(weights: list[Decimal], values: list[Decimal]) -> Decimal:
                return sum((n * w * v for n, w, v in zip(counts, weights, values, strict=True)), Decimal(0))

            q, log_q = softmax(z)
            p, log_p = softmax([z[0] + (v - z[0]) / t for v in z])
            gap = [b - a for a, b in zip(log_q, log_p, strict=True)]
            entropy, reverse = -mean(q, log_q), -mean(q, gap)
            answers = (log_p[target], entropy, -mean(p, log_p), mean(p, gap), reverse)
            gradients = (
                [((kind == target) - x) / t for kind, x in enumerate(p)],
                [-x * (log_x + entropy) for x, log_x in zip(q, log_q, strict=True)],
                [a - b for a, b in zip(q, p, strict=True)],
                [-x * (g + reverse) for x, g in zip(q, gap, strict=True)],
            )
            return Exact(*map(float, answers), *([float(x) for x in g] for g in gradients))
