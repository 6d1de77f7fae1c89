"""KL(policy || reference) from the sampled tokens' log-probabilities alone, one value a token.

With d = log pi(y) - log pi_ref(y) (Schulman, "Approximating KL divergence", 2020):

    k1 = d        k2 = d^2 / 2        k3 = exp(-d) - 1 + d

k1 and k3 are unbiased as values, k2 alone in its gradient: over tokens that the policy sampled, E[d grad log pi] is the KL's
gradient, that of k1 is zero, and that of k3 is the gradient of KL(reference || policy). "k1+" and "k3+" have the value of the
one and the gradient of k2, as in verl (`kl_penalty`, core_algos.py).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3", "k1+", "k3+"]

MAX_LOG_RATIO = 20.0  # exp() of a larger one says nothing but "far away" and only risks overflow
MAX_K3 = 10.0  # verl's bound: beyond it a token has no gradient


def reference_kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """[T] float32 -> [T]; carries gradient to `logprobs`."""
    difference = logprobs - ref_logprobs
    squared = difference.square() / 2
    match estimator:
        case "k1":
            return difference
        case "k2":
            return squared
        case "k3":
            return _k3(difference)
    value = difference if estimator == "k1+" else _k3(difference)
    return squared + (value - squared).detach()


def _k3(difference: Tensor) -> Tensor:
    clamped = (-difference).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (clamped.expm1() - clamped).clamp_max(MAX_K3)
