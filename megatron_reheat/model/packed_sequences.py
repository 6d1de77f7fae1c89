"""What attention needs to know of a packed micro-batch, worked out once for all layers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_reheat.parallel.context import ContextSplit


class LengthClass(NamedTuple):
    """Packed sequences that are attended as one padded block [S, L]: where each of their n tokens lies, [n] both.

    `position` is a token's place in the packing, `place` that in the flattened block.
    """

    shape: tuple[int, int]
    position: Tensor
    place: Tensor

    @property
    def size(self) -> int:
        """Places, padding included."""
        return self.shape[0] * self.shape[1]


def length_classes(borders: Sequence[int], device: torch.device, parts: int = 1) -> Iterator[LengthClass]:
    """Sequences whose lengths lie between the same powers of two, so that at most half of a block is padding.

    In one block with a long sequence, short ones would cost as much as that one does. With `parts`, the same sequences are
    together, of each of which only one of so many equal parts is there.
    """
    members: dict[int, list[tuple[int, int]]] = {}
    for start, end in itertools.pairwise(borders):
        if end > start:
            members.setdefault((end - start - 1).bit_length(), []).append((start, end - start))
    for sequences in members.values():
        starts, lengths = torch.tensor(sequences, device=device).T // parts
        count, longest = sum(n for _, n in sequences) // parts, max(n for _, n in sequences) // parts
        row = torch.repeat_interleave(torch.arange(len(sequences), device=device), lengths, output_size=count)
        column = torch.arange(count, device=device) - (lengths.cumsum(0) - lengths)[row]
        yield LengthClass((len(sequences), longest), starts[row] + column, row * longest + column)


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's record of where sequences begin and end, and what its own layers would make of it in every layer.

    position_ids: [T] int64, of each token in its sequence; None where Megatron rotates queries and keys itself
    frequencies:  [d/2] float32, of the rotary embedding; None likewise
    split:        how they lie on the ranks of a context-parallel group, whose T is then a part of them, while the borders are
                  those of whole sequences, as Megatron and Transformer Engine have it; None where each is here as a whole
    """

    position_ids: Tensor | None = None
    frequencies: Tensor | None = None
    split: ContextSplit | None = None

    @classmethod
    def of(
        cls,
        cu_seqlens: Tensor,
        max_seqlen: int,
        position_ids: Tensor,
        frequencies: Tensor | None,
        split: ContextSplit | None = None,
    ) -> PackedSequences:
        """`cu_seqlens` is [S+1] int32, where sequences begin, and where the last one ends; padding counts as part of them."""
        # Transformer Engine asks for these with context parallelism. Padding behind a sequence is attended like the rest of it,
        # which does not see it, so they are the same, and any attention kernel will do. `cp_group` stays empty: it is for a
        # group that changes from one micro-batch to the next, and the layers have the run's from their construction.
        padded = None if split is None else cu_seqlens
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            cu_seqlens_q_padded=padded,
            cu_seqlens_kv_padded=padded,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
            position_ids=position_ids,
            frequencies=frequencies,
            split=split,
        )

    @cached_property
    def classes(self) -> list[LengthClass]:
        """Of keys and values: all of them, under context parallelism one rank's after the other's.

        Made once; on a GPU that waits for what is queued, because the borders are read on the host.
        """
        classes = self._classes()
        if self.split is None:
            return classes
        return [c._replace(position=self.split.place[c.position]) for c in classes]

    @cached_property
    def query_classes(self) -> list[LengthClass]:
        """Of queries, the same sequences together: those of this rank's tokens, in a block of that many."""
        return self.classes if self.split is None else self._classes(self.split.size)

    def _classes(self, parts: int = 1) -> list[LengthClass]:
        return list(length_classes(self.cu_seqlens_q.tolist(), self.cu_seqlens_q.device, parts))

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """For each class [S, 1, Lq, L] bool, True where a query sees a key; None where that is causality in whole sequences."""
        if self.split is None:
            return [None] * len(self.classes)
        assert self.position_ids is not None
        masks: list[Tensor | None] = []
        for queries, keys in zip(self.query_classes, self.classes, strict=True):
            (places,) = _scattered(self.position_ids, [queries])
            columns = torch.arange(keys.shape[1], device=places.device)
            masks.append(columns <= places.view(queries.shape)[:, None, :, None])
        return masks

    @cached_property
    def _angles(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines, [T, 1, 1, d] float32, the same for both halves."""
        assert self.frequencies is not None and self.position_ids is not None
        angles = torch.outer(
            torch.arange(self.max_seqlen_q, device=self.frequencies.device), self.frequencies.repeat(2)
        )
        return angles.cos()[self.position_ids][:, None, None], angles.sin()[self.position_ids][:, None, None]

    def blocks(self, states: Tensor, classes: Sequence[LengthClass]) -> tuple[Tensor, ...]:
        """[T, heads, d] as one block [S, heads, L, d] for each of the `classes`, zero where they are padded."""
        blocks: tuple[Tensor, ...] = _Scatter.apply(states, classes)
        return tuple(b.view(*c.shape, *b.shape[1:]).transpose(1, 2) for b, c in zip(blocks, classes, strict=True))

    def unblocked(self, blocks: Sequence[Tensor]) -> Tensor:
        """The inverse of `blocks`, of queries."""
        flat: Tensor = _Gather.apply(self.query_classes, *(b.transpose(1, 2).flatten(0, 1) for b in blocks))
        return flat

    def rotated(self, states: Tensor) -> Tensor:
        """Queries or keys [T, 1, heads, d] with the rotary embedding of their positions (arXiv 2104.09864), halves apart as in
        transformers; the same bits as Megatron's."""
        rotated: Tensor = _Rotation.apply(states, *(factor.to(states.dtype) for factor in self._angles))
        return rotated


def _scattered(states: Tensor, classes: Sequence[LengthClass]) -> tuple[Tensor, ...]:
    return tuple(
        states.new_zeros(c.size, *states.shape[1:]).index_copy_(0, c.place, states.index_select(0, c.position))
        for c in classes
    )


def _gathered(blocks: Sequence[Tensor], classes: Sequence[LengthClass]) -> Tensor:
    states = blocks[0].new_empty(sum(len(c.position) for c in classes), *blocks[0].shape[1:])
    for block, c in zip(blocks, classes, strict=True):
        states.index_copy_(0, c.position, block.index_select(0, c.place))
    return states


# Each is the other's backward pass: every token lies in one place of one block. Autograd's own for what is taken by an index
# adds where it could copy, because it does not know that.


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, classes: Sequence[LengthClass]) -> tuple[Tensor, ...]:
        ctx.classes = classes
        return _scattered(states, classes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _gathered(gradients, ctx.classes), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, classes: Sequence[LengthClass], *blocks: Tensor) -> Tensor:
        ctx.classes = classes
        return _gathered(blocks, classes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, *_scattered(gradient, ctx.classes)


def _turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half, turned, across = states.size(-1) // 2, states * cos, states * sin
    turned[..., :half].sub_(across[..., half:])
    turned[..., half:].add_(across[..., :half])
    return turned


class _Rotation(torch.autograd.Function):
    """Autograd's own would keep and walk through each product of it."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(states, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, -sin), None, None
