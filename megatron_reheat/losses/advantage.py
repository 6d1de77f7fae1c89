"""Group-relative advantages (GRPO, arXiv 2402.03300) and DAPO's soft overlong punishment (arXiv 2503.14476)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

EPSILON = 1e-6


def group_advantages(rewards: Sequence[float], *, normalize_by_std: bool = True) -> list[float]:
    """(R - mean) / (std + 1e-6) with the unbiased standard deviation; without the division this is Dr. GRPO's form.

    A group of one has no baseline: its mean counts as 0 and its deviation as 1. Equal rewards give exactly 0: a mean that is
    rounded would make some of them a little better than itself, and a gate on A > 0 would open.
    """
    if len(rewards) == 1:
        return [float(rewards[0])]
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    scale = statistics.stdev(rewards) + EPSILON if normalize_by_std else 1.0
    return [(reward - mean) / scale for reward in rewards]


def overlong_penalty(length: int, *, max_tokens: int, buffer: int, factor: float) -> float:
    """0 up to `max_tokens - buffer` response tokens, then linear down to -factor at `max_tokens`."""
    if buffer == 0:
        return 0.0
    return min(-(length - (max_tokens - buffer)) / buffer * factor, 0.0)
