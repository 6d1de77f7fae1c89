"""Dense float64 references, written from the definitions and differentiated by autograd; shared by unit and dist tests."""

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


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the reference; absolute below 1e-6, where the reference itself is zero."""
    difference = (actual.detach().double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-6)).item()
