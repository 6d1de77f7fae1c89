"""What several seeds say together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

DIGITS = 5  # that a result keeps
# Student's t at 0.975, by degrees of freedom from 1
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
FEWEST_SEEDS = 3  # of two, the interval is 13 standard errors wide


def rounded(value: Any) -> Any:
    """What a result's file keeps of a tree: numbers with DIGITS digits, null for a NaN."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    if not isinstance(value, float):
        return value
    return None if math.isnan(value) else float(f"{value:.{DIGITS}g}")


class Mean(NamedTuple):
    """Over seeds, with the half width of Student's 95% interval; infinite, and not shown, for fewer than three."""

    value: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        value, n = statistics.fmean(values), len(values)
        if n < FEWEST_SEEDS:
            return cls(value, math.inf)
        return cls(value, T_QUANTILES[min(n - 1, len(T_QUANTILES)) - 1] * statistics.stdev(values) / math.sqrt(n))

    @property
    def low(self) -> float:
        return self.value - self.half

    @property
    def high(self) -> float:
        return self.value + self.half

    def show(self, digits: int) -> str:
        return f"{self.value:.{digits}f}" + (f" ± {self.half:.{digits}f}" if math.isfinite(self.half) else "")
