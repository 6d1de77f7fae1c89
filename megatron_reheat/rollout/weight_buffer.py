"""The memory that weights cross in from trainer to engine on one machine: host memory, or a GPU's.

A sender makes a buffer and hands its `source` to the engine's workers, which open it. Both ends then see the same bytes.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_reheat.rollout.packed import Entry, read_tensor, write_tensor


@dataclass(frozen=True)
class HostSource:
    """A file of anonymous memory, by its path under /proc."""

    path: str
    capacity: int


@dataclass(frozen=True)
class DeviceSource:
    """GPU memory, by what torch rebuilds a tensor of another process from."""

    handle: tuple[Any, ...]
    capacity: int


Source = HostSource | DeviceSource


class SendBuffer(Protocol):
    """The sender's end."""

    @property
    def capacity(self) -> int:
        """Bytes."""
        ...

    @property
    def source(self) -> Source:
        """What the other end opens it by; another one after `grow`."""
        ...

    def write(self, name: str, tensor: torch.Tensor, offset: int, verify: bool) -> Entry:
        """Copies `tensor` to byte `offset`; `verify` adds the digest of what it was copied from (`write_tensor`)."""
        ...

    def flush(self) -> None:
        """Returns when everything written can be read by the other end."""
        ...

    def grow(self, capacity: int) -> None:
        """The contents are lost; the engine must be given the new `source`."""
        ...

    def close(self) -> None:
        """Lets go of the memory; safe to call twice."""
        ...


class HostBuffer:
    """Shared host memory, for an engine on the CPU.

    A memfd has no name: nothing is left behind whatever dies, and a small /dev/shm mount does not limit it. Its pages are
    allocated when first written, so the capacity costs nothing until it is used.
    """

    def __init__(self, capacity: int) -> None:
        self._fd = os.memfd_create("reheat-weights")
        self.capacity = 0
        self.grow(capacity)

    @property
    def source(self) -> HostSource:
        return HostSource(f"/proc/{os.getpid()}/fd/{self._fd}", self.capacity)

    def write(self, name: str, tensor: torch.Tensor, offset: int, verify: bool) -> Entry:
        return write_tensor(self._bytes, name, tensor, offset, verify)

    def flush(self) -> None:
        """A copy to host memory is complete when it returns."""

    def grow(self, capacity: int) -> None:
        if capacity > os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, capacity)
        self._bytes = _map(self._fd, capacity)
        self.capacity = capacity

    def close(self) -> None:
        """Gives the descriptor back; the pages go when the last view of them does. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._bytes = torch.empty(0, dtype=torch.uint8)


class DeviceBuffer:
    """Memory of GPU number `gpu`, for an engine on the same GPU (or its neighbours, over peer-to-peer access).

    The engine's processes open it once by CUDA IPC (`torch.multiprocessing.reductions`), so a sync copies on the device
    alone. The memory stays the trainer's: it goes back when this object and every view of it are gone.
    """

    def __init__(self, capacity: int, gpu: int) -> None:
        self._device = torch.device("cuda", gpu)
        self.grow(capacity)

    @property
    def source(self) -> DeviceSource:
        return self._source

    def write(self, name: str, tensor: torch.Tensor, offset: int, verify: bool) -> Entry:
        return write_tensor(self._bytes, name, tensor, offset, verify)

    def flush(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()

    def grow(self, capacity: int) -> None:
        from torch.multiprocessing.reductions import reduce_tensor

        self._bytes = torch.empty(capacity, dtype=torch.uint8, device=self._device)
        self.capacity = capacity
        _, handle = reduce_tensor(self._bytes)
        self._source = DeviceSource(handle, capacity)

    def close(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)


class OpenBuffer:
    """The receiver's end of either kind."""

    # position of the device index in what `reduce_tensor` returns: the sender's index means nothing here
    _DEVICE_INDEX = 6

    def __init__(self, source: Source) -> None:
        self.source = source
        if isinstance(source, HostSource):
            fd = os.open(source.path, os.O_RDWR)
            self._bytes = _map(fd, source.capacity)
            os.close(fd)
            return
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        handle = list(source.handle)
        handle[self._DEVICE_INDEX] = 0  # an engine sees its own GPUs only, the sender's first
        self._bytes = rebuild_cuda_tensor(*handle)

    def read(self, entry: Entry) -> torch.Tensor:
        """The tensor of `entry` as a view of the buffer; raises WeightSyncError as `read_tensor` does."""
        return read_tensor(self._bytes, entry)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is a view of the buffer."""
        same_device = tensor.device == self._bytes.device
        return same_device and tensor.untyped_storage().data_ptr() == self._bytes.untyped_storage().data_ptr()


def _map(fd: int, capacity: int) -> torch.Tensor:
    # torch keeps the mapping alive as long as a tensor views it, so remapping never pulls memory from under one
    return torch.frombuffer(mmap.mmap(fd, capacity), dtype=torch.uint8)
