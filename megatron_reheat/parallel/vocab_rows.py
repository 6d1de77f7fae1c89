"""What the vocabulary kernels exchange per token: the merged sums, and the coefficients of the gradient.

The symbols are those of `vocab_kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RowScalars:
    """Per-token scalars [N] float64, merged over the shards: the same on every rank of the group."""

    maximum: Tensor  # m
    log_sum: Tensor  # A1 = log s1
    mean: Tensor  # M1 = w1 / s1
    tempered_log_sum: Tensor  # AT = log sT
    tempered_mean: Tensor  # MT = wT / sT
    target: Tensor  # z_y - m

    def rows(self, rows: slice) -> RowScalars:
        return RowScalars(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class RowCoefficients:
    """Per-token coefficients [N] of the gradient's three terms; None where a term is absent."""

    target: Tensor | None = None
    entropy: Tensor | None = None
    contrast: Tensor | None = None

    def rows(self, rows: slice) -> RowCoefficients:
        return RowCoefficients(*(None if c is None else c[rows] for c in (self.target, self.entropy, self.contrast)))
