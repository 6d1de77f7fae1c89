"""How a layer attends, made again from its queries and keys at a few positions: fused kernels return no probabilities.

Tensor parallelism splits the heads: a divergence is summed over this rank's and then over the group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_reheat.metrics import MetricSums
from megatron_reheat.parallel.packing import MicroBatch
from megatron_reheat.parallel.shards import gather_shards
from megatron_reheat.parallel.vocab_kernels import chunks, compute_dtype

EXCLUDED = -1e9  # a score whose exponential is zero in any dtype; finite, so that 0 x log 0 stays 0
# Numbers of gathered keys that exist at a time; the backward pass gathers them again.
_GATHERED = 1 << 26


class Positions(NamedTuple):
    """Q queries and up to K keys for each, as positions in the micro-batch's packed tokens.

    queries [Q] int64; keys [Q, K] int64; valid [Q, K] bool, at least one True in every row.
    """

    queries: Tensor
    keys: Tensor
    valid: Tensor


class Attention:
    """One layer's, over all packed tokens.

    Args:
        queries: [T, heads/TP, d] as they enter the softmax, after normalization and rotary embedding; this rank's heads.
        keys: [T, groups/TP, d] likewise; each serves as many consecutive heads.
        group: the tensor-parallel group, or None if the heads are not split.
    """

    def __init__(self, queries: Tensor, keys: Tensor, group: dist.ProcessGroup | None = None) -> None:
        self.queries, self.keys, self.group = queries, keys, group

    def detached(self) -> Attention:
        """The same tensors without gradient."""
        return Attention(self.queries.detach(), self.keys.detach(), self.group)

    def js_to(self, other: Attention, positions: Positions) -> Tensor:
        """Jensen-Shannon divergence between this layer's attention and another's, which gets no gradient.

        Both are renormalized over the given keys.

        Returns:
            [Q] float32, the mean over all heads, in [0, ln 2] nats up to rounding; the same on every rank of the group. It
            carries gradient to this rank's queries and keys.
        """
        rows = max(_GATHERED // max(positions.keys.size(1) * self.keys[0].numel(), 1), 1)
        sums = [self.queries.new_zeros(0, dtype=compute_dtype(self.queries))]
        for part in chunks(len(positions.queries), rows):
            arguments = other.detached(), Positions(*(p[part] for p in positions))
            sums.append(checkpoint(self._js_sum, *arguments, use_reentrant=False, preserve_rng_state=False))
        ranks = 1 if self.group is None else dist.get_world_size(self.group)
        total: Tensor = _SumOverRanks.apply(torch.cat(sums), self.group)
        return total / (self.queries.size(1) * ranks)

    def _js_sum(self, other: Attention, positions: Positions) -> Tensor:
        """[Q] over this rank's heads."""
        mine, theirs = (a._log_probabilities(positions) for a in (self, other))
        mixed = torch.logaddexp(mine, theirs) - math.log(2)
        return 0.5 * (mine.exp() * (mine - mixed) + theirs.exp() * (theirs - mixed)).sum((1, 2, 3))

    def _log_probabilities(self, positions: Positions) -> Tensor:
        """[Q, groups, heads per group, K]"""
        dtype = compute_dtype(self.queries)
        queries, keys = self.queries[positions.queries].to(dtype), self.keys[positions.keys].to(dtype)
        queries = queries.unflatten(1, (keys.size(2), -1)) * queries.size(-1) ** -0.5
        scores = torch.einsum("qghd,qkgd->qghk", queries, keys)
        return scores.masked_fill(~positions.valid[:, None, None], EXCLUDED).log_softmax(-1)


@dataclass(frozen=True)
class AttentionTerm:
    """A term of the loss that compares how layers attend. It sees the whole micro-batch, and returns its share of the batch's
    loss and metric sums, as a loss does.

    `layers` are counted from 1; the term finds each by its number.
    """

    layers: tuple[int, ...]
    loss: Callable[[Mapping[int, Attention], MicroBatch], tuple[Tensor, MetricSums]]


class _SumOverRanks(torch.autograd.Function):
    """Each rank's share has gradient one."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        return gather_shards(local, group).sum(0)  # in rank order: bitwise the same on every rank

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None
