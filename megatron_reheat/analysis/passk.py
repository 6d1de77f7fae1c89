"""avg@k and pass@k from graded samples, with bootstrap intervals over prompts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BoolArray = NDArray[np.bool_]
RealArray = NDArray[np.float64]


def avg_at_k(correct: BoolArray) -> float:
    """Mean accuracy of single samples; `correct` is [P, n], n graded samples for each of P prompts."""
    return float(_checked(correct).mean())


def pass_at_k(correct: BoolArray, k: int) -> float:
    """Chance that at least one of k samples is correct, averaged over prompts; `correct` is [P, n], 1 <= k <= n.

    Raises:
        ValueError: `k` is out of range, or `correct` is not a non-empty [P, n] array.
    """
    return float(pass_at_k_by_prompt(correct, k).mean())


def pass_at_k_by_prompt(correct: BoolArray, k: int) -> RealArray:
    """[P]: the unbiased estimate 1 - C(n-c, k) / C(n, k) for each prompt with c of its n samples correct."""
    correct = _checked(correct)
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= n, and there are n = {n} samples for each prompt")
    wrong = n - correct.sum(axis=1, dtype=np.int64)
    # C(w, k) / C(n, k) as a product of k factors: the binomials themselves overflow for large n.
    drawn = np.arange(k)
    factors = np.maximum(wrong[:, None] - drawn, 0) / (n - drawn)
    return 1.0 - factors.prod(axis=1)


def bootstrap_interval(
    values: NDArray[np.floating], seed: int, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` [P], resampling prompts with replacement; the same for the same seed.

    Raises:
        ValueError: there are no values, or `level` is not between 0 and 1.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"bootstrap_interval needs one value per prompt, [P] with P >= 1, got shape {values.shape}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _checked(correct: BoolArray) -> BoolArray:
    correct = np.asarray(correct)
    if correct.ndim != 2 or not correct.size:
        raise ValueError(f"expected graded samples as a non-empty [P, n] array, got shape {correct.shape}")
    return correct.astype(bool)
