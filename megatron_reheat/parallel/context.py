"""Context parallelism: every rank of a group has a part of each sequence of a micro-batch.

A sequence is cut into 2 CP chunks of one length, of which rank r has number r from either end. Causal attention has more to do
the later a position is, and so each rank has as much to do as the others. It is the split that Transformer Engine expects.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_reheat.parallel.shards import gather_shards


def sequence_multiple(context_size: int) -> int:
    """What the length of every packed sequence is padded to a multiple of."""
    return 2 * context_size if context_size > 1 else 1


def context_positions(cu_seqlens: Tensor, rank: int, size: int) -> Tensor:
    """Where the tokens of context rank `rank` lie among all T packed ones.

    Args:
        cu_seqlens: [S+1] int, where sequences begin, and where the last one ends; their lengths are multiples of 2 `size`.

    Returns:
        [T/size] int64, in the sequences' order, and in that of their positions.
    """
    borders = cu_seqlens.long()
    chunks = borders.diff() // (2 * size)
    starts = torch.cat([borders[:-1] + rank * chunks, borders[1:] - (rank + 1) * chunks])
    # both chunks of a sequence one after the other
    starts, lengths = starts.view(2, -1).t().flatten(), chunks.repeat_interleave(2)
    ends = lengths.cumsum(0)
    return torch.arange(int(ends[-1]), device=borders.device) + (starts - ends + lengths).repeat_interleave(lengths)


@dataclass(frozen=True)
class ContextSplit:
    """How the T packed tokens of a micro-batch lie on the ranks of a context-parallel group.

    cu_seqlens: [S+1] int32 of the whole micro-batch, as `context_positions` takes them
    """

    cu_seqlens: Tensor
    rank: int
    size: int
    group: dist.ProcessGroup

    @cached_property
    def order(self) -> Tensor:
        """[T] int64: of all ranks' tokens, one rank's after the other's, the places in the micro-batch."""
        return torch.cat([context_positions(self.cu_seqlens, rank, self.size) for rank in range(self.size)])

    @property
    def here(self) -> Tensor:
        """[T/CP] int64: of this rank's tokens."""
        return self.order.chunk(self.size)[self.rank]

    @cached_property
    def place(self) -> Tensor:
        """[T] int64: the inverse of `order`."""
        places = torch.arange(len(self.order), device=self.order.device)
        return torch.empty_like(places).index_copy_(0, self.order, places)

    def whole(self, values: Tensor) -> Tensor:
        """[T/CP, ...] of this rank's tokens -> [T, ...] of all, in the micro-batch's order, without gradient. A collective."""
        return gather_shards(values.detach().contiguous(), self.group).flatten(0, 1)[self.place]

    def total(self, values: Tensor) -> Tensor:
        """The sum over the ranks, bitwise the same on each, without gradient. A collective."""
        return gather_shards(values.detach().contiguous(), self.group).sum(0)
