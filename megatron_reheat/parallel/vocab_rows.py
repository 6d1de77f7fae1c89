"""What the vocabulary kernels exchange per token: the merged sums, and the coefficients of the gradient.

The symbols are those of `vocab_kernels` and `pair_kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowScalars:
    """Per-token scalars [N] float64, merged over the shards: the same on every rank of the group."""

    maximum: Tensor  # m
    log_sum: Tensor  # A1 = log(1 + r1)
    mean: Tensor  # M1 = w1 / (1 + r1)
    tempered_log_sum: Tensor  # AT = log(1 + rT)
    tempered_mean: Tensor  # MT = wT / (1 + rT)
    target: Tensor  # z_y - m

    def rows(self, rows: slice) -> RowScalars:
        """Views of those of some tokens."""
        return RowScalars(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class RowCoefficients:
    """Per-token coefficients [N] of the gradient's three terms; None where a term is absent."""

    target: Tensor | None = None
    entropy: Tensor | None = None
    contrast: Tensor | None = None

    def rows(self, rows: slice) -> RowCoefficients:
        """Views of those of some tokens; what is absent stays so."""
        return RowCoefficients(*(None if c is None else c[rows] for c in (self.target, self.entropy, self.contrast)))


@dataclass(frozen=True)
class PairScalars:
    """Per-token scalars [N] float64 of two distributions at one temperature T, the same on every rank of the group."""

    maximum: Tensor  # of the policy's logits z, at its top token
    log_sum: Tensor  # log sum e^((z - maximum) / T)
    other_maximum: Tensor
    other_log_sum: Tensor
    other_at_top: Tensor  # the other logit of the policy's top token
    center: Tensor  # the sum that the gradient subtracts; zero until it is known

    def swapped(self) -> PairScalars:
        """As the other distribution sees it, without the last two."""
        own = self.maximum, self.log_sum
        return PairScalars(self.other_maximum, self.other_log_sum, *own, self.maximum, torch.zeros_like(self.center))

    def rows(self, rows: slice) -> PairScalars:
        """Views of those of some tokens."""
        return PairScalars(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


class PairConstants(NamedTuple):
    """Of `PairScalars`, [N] in the dtype of the arithmetic: differences are taken before they are rounded."""

    inverse_temperature: Tensor
    maximum: Tensor
    log_sum: Tensor
    other_maximum: Tensor
    other_log_sum: Tensor
    shift: Tensor  # maximum - other maximum, with its rounding error,
    shift_error: Tensor
    gap: Tensor  # log sum - other log sum: x = (z - u - shift) / T - gap
    top: Tensor  # z - u at the policy's top token, likewise,
    top_error: Tensor
    top_gap: Tensor  # x - x* = (z - u - top) / T - top_gap
    top_other_share: Tensor  # q / (p + q) at the policy's top token,
    top_log_share: Tensor  # log(p / (p + q)) there
    center: Tensor
    factor: Tensor
