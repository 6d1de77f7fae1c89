"""What a checkpoint is made of, copied into host memory, so that training may go on while it is written.

Megatron plans a save with tensors that hold nothing (`meta`): it cuts them as it would cut the values, and the writer then
takes the same cuts of the copies. So a value is copied once, the distributed optimizer's parts are put together by the writer,
and a tensor whose copy nobody made cannot be written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_reheat.model.master_weights import Part

_MOMENTS = ("exp_avg", "exp_avg_sq")  # what Megatron before 0.19 takes for granted


def names_of_values(optimizer: DistributedOptimizer) -> tuple[str, ...]:
    """What it keeps of each parameter, the master weight included."""
    return ("param", *getattr(optimizer, "optimizer_state_keys", _MOMENTS))


class HostBuffers:
    """Host memory that every save uses again, page-locked beside a GPU. What is asked for in the same order is the same."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._buffers: list[Tensor] = []
        self._taken = 0

    def begin(self) -> None:
        """From the first buffer on, whose last contents are not needed any more."""
        self._taken = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor that may hold anything."""
        index, self._taken = self._taken, self._taken + 1
        if index < len(self._buffers):
            found = self._buffers[index]
            if found.shape == torch.Size(shape) and found.dtype == dtype:
                return found
            del self._buffers[index:]  # before there are others
        self._buffers.append(torch.empty(tuple(shape), dtype=dtype, pin_memory=self._on_gpu))
        return self._buffers[index]

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Copies that are queued inside have ended behind it: nothing that was copied may change before."""
        if not self._on_gpu:
            yield
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


@dataclass(frozen=True)
class _Shards:
    """This rank's part of a buffer of the distributed optimizer: by name float32 [numel / replicas], bucket behind bucket."""

    values: dict[str, Tensor]
    wholes: dict[str, Tensor]  # the places of what the first replica puts together, [numel]; none on others
    buckets: Sequence[tuple[int, int]]  # offset in the whole, elements


@dataclass(frozen=True)
class _PlacedPart:
    """This rank's part of a parameter's values, copied, and the place of all of them, which the first replica alone has."""

    part: Part
    place: Tensor | None


class HostCopy:
    """The values of one save. `planning` and `copy` belong to the thread that trains, the rest to the one that writes."""

    def __init__(self, buffers: HostBuffers) -> None:
        self._buffers = buffers
        self._sources: dict[int, Tensor] = {}  # by the storage of the tensor without values that stands for it
        self._places: list[Tensor] = []  # else another's storage may come to lie where one of theirs was
        self._shards: list[_Shards] = []
        self._parts: list[_PlacedPart] = []
        self._group: dist.ProcessGroup | None = None
        buffers.begin()

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Inside, the distributed optimizer's state is copied, and not gathered. Nor is garbage collected, for which Megatron
        stops for half a second: what it means to free before it gathers again is not there."""

        def copy_shards(optimizer: DistributedOptimizer, **_: Any) -> dict[Any, Any] | None:
            return self._copy_shards(optimizer)

        with (
            mock.patch.object(DistributedOptimizer, "get_parameter_state_dp_zero", copy_shards),
            mock.patch.object(distrib_optimizer, "gc", SimpleNamespace(collect=lambda: 0)),
        ):
            yield

    def copy(self, sharded: dict[str, Any], *, is_fresh: bool = False) -> None:
        """Of the tensors that this rank writes, which then hold nothing. With `is_fresh` nobody else has them: no copy is made.

        A tensor's first replica writes it, and what is made of it.
        """
        for entry in nested_values(sharded):
            if isinstance(entry, ShardedTensor | ShardedTensorFactory) and not entry.data.is_meta:
                values, entry.data = entry.data.detach(), self._place(entry.data.shape, entry.data.dtype)
                if not is_main_replica(entry.replica_id):
                    continue
                source = values
                if not is_fresh:
                    source = self._buffers.take(values.shape, values.dtype)
                    source.copy_(values, non_blocking=True)
                self._sources[_storage(entry.data)] = source

    def copy_parts(self, parts: Sequence[Part], *, is_first: bool) -> dict[str, Tensor]:
        """What stands for these parameters' values, by name; the first replica puts them together (`gather`)."""
        places = {part.name: self._place(part.shape, torch.float32) for part in parts}
        for part in parts:
            if is_first or part.is_split:
                copied = self._buffers.take(part.values.shape, torch.float32)
                copied.copy_(part.values)
                self._parts.append(_PlacedPart(replace(part, values=copied), places[part.name] if is_first else None))
        return places

    def gather(self, group: dist.ProcessGroup | None) -> None:
        """Puts the distributed optimizer's state and what `copy_parts` has together on the first replicas. A collective of
        `group`, a gloo group of this rank's replicas that no other thread uses meanwhile; None takes the optimizer's own."""
        group = group or self._group
        for shards in self._shards:
            assert group is not None
            ranks = dist.get_process_group_ranks(group)
            for name, mine in shards.values.items():
                whole = None
                if shards.wholes:
                    whole = mine if len(ranks) == 1 else torch.empty(shards.wholes[name].shape)
                    self._sources[_storage(shards.wholes[name])] = whole
                if len(ranks) > 1:
                    _put_together(mine, whole, shards.buckets, ranks, group)
        self._shards.clear()
        for placed in self._parts:
            if placed.part.is_split:
                assert group is not None
                whole = _collect(placed.part, placed.place is not None, group)
            else:
                whole = placed.part.values
            if placed.place is not None:
                self._sources[_storage(placed.place)] = whole
        self._parts.clear()

    def forget(self) -> None:
        """Gives up what the buffers do not hold."""
        self._sources.clear()

    def values(self, place: Tensor) -> Tensor:
        """What a tensor of Megatron's plan stands for, in host memory and alone in its storage."""
        source = self._sources[_storage(place)].flatten()
        cut = source.as_strided(place.shape, place.stride(), place.storage_offset())
        # torch writes the whole storage: one of numpy's arrays is as large as what is cut out
        return torch.from_numpy(cut.reshape(-1).view(torch.uint8).numpy()).view(cut.dtype).view(cut.shape)

    def _place(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        place = torch.empty(tuple(shape), dtype=dtype, device="meta")
        self._places.append(place)
        return place

    def _copy_shards(self, optimizer: DistributedOptimizer) -> dict[Any, Any] | None:
        """In the form of Megatron's `get_parameter_state_dp_zero`, but with the padding between buckets, which the places of
        parameters count."""
        self._group = optimizer.data_parallel_group_gloo
        replicas, is_first = self._group.size(), self._group.rank() == 0
        names = names_of_values(optimizer)
        state: dict[Any, Any] = {"buckets_coalesced": True}
        for index, (buffer, ranges) in enumerate(zip(optimizer.buffers, optimizer.gbuf_ranges, strict=True)):
            ((dtype, of_buckets),) = ranges.items()
            buckets = [(bucket.offset, bucket.grad_data.numel()) for bucket in buffer.buckets]
            numel = sum(size for _, size in buckets)
            values = {name: self._buffers.take((numel // replicas,), torch.float32) for name in names}
            start = 0
            for (_, size), of_bucket in zip(buckets, of_buckets, strict=True):
                for parameter, place in of_bucket["param_map"].items():
                    tensors = optimizer._get_main_param_and_optimizer_states(parameter)
                    first, last = place["gbuf_local"].start, place["gbuf_local"].end
                    for name in names:
                        values[name][start + first : start + last].copy_(
                            tensors[name].detach().flatten(), non_blocking=True
                        )
                start += size // replicas
            wholes = {name: self._place((numel,), torch.float32) for name in names} if is_first else {}
            self._shards.append(_Shards(values, wholes, buckets))
            state[index] = {dtype: {**wholes, "numel_unpadded": buffer.numel_unpadded}}
        return state if is_first else None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _put_together(
    mine: Tensor,
    whole: Tensor | None,
    buckets: Sequence[tuple[int, int]],
    ranks: Sequence[int],
    group: dist.ProcessGroup,
) -> None:
    """Straight into their place: a gather would need a copy of all of them beside."""
    start = 0
    for offset, size in buckets:
        part = size // len(ranks)
        own = mine[start : start + part]
        if whole is None:
            dist.send(own, ranks[0], group=group)
        else:
            whole[offset : offset + part] = own
            for number, rank in enumerate(ranks[1:], start=1):
                dist.recv(whole[offset + number * part : offset + (number + 1) * part], rank, group=group)
        start += part


def _collect(part: Part, is_first: bool, group: dist.ProcessGroup) -> Tensor:
    """All of a parameter's values on the first replica; anything on others."""
    ranks = dist.get_process_group_ranks(group)
    if not is_first:
        dist.send(torch.tensor([part.first, part.values.numel()]), ranks[0], group=group)
        if part.values.numel():
            dist.send(part.values, ranks[0], group=group)
        return part.values
    whole, extent = torch.empty(part.shape.numel()), torch.empty(2, dtype=torch.int64)
    whole[part.first : part.first + part.values.numel()] = part.values
    for rank in ranks[1:]:
        dist.recv(extent, rank, group=group)
        first, size = extent.tolist()
        if size:
            dist.recv(whole[first : first + size], rank, group=group)
    return whole
