"""Weights cross from trainer to engine in anonymous shared memory that both processes map.

A memfd has no name: nothing is left behind whatever dies, and a small /dev/shm mount does not limit it. Its pages are
allocated when first written, so the capacity costs nothing until it is used.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import torch
import xxhash

from megatron_reheat.errors import WeightSyncError

ALIGNMENT = 64


@dataclass(frozen=True)
class Entry:
    """One tensor inside the buffer. `dtype` is the name of a torch dtype; `digest` is None when nobody verifies."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    digest: int | None = None


class SharedBuffer:
    """Bytes mapped by sender and receiver. The sender creates it, the receiver maps the inherited descriptor."""

    def __init__(self, fd: int, capacity: int) -> None:
        self.fd = fd
        self.capacity = capacity
        self._bytes = _map(fd, capacity)

    @classmethod
    def create(cls, capacity: int) -> SharedBuffer:
        fd = os.memfd_create("reheat-weights")
        os.ftruncate(fd, capacity)
        return cls(fd, capacity)

    def resize(self, capacity: int) -> None:
        """Follows the other side to a new capacity; the contents stay, the file never shrinks."""
        if capacity == self.capacity:
            return
        if capacity > os.fstat(self.fd).st_size:
            os.ftruncate(self.fd, capacity)
        self._bytes = _map(self.fd, capacity)
        self.capacity = capacity

    def write(self, name: str, tensor: torch.Tensor, offset: int, verify: bool) -> Entry:
        """Copies a tensor of any device to `offset`; with `verify` the digest is that of the source."""
        tensor = tensor.detach()
        entry = Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset)
        self.read(entry).copy_(tensor)
        if not verify:
            return entry
        return Entry(entry.name, entry.dtype, entry.shape, offset, digest(name, tensor))

    def read(self, entry: Entry) -> torch.Tensor:
        """The tensor of `entry` as a view of the shared bytes.

        Raises:
            WeightSyncError: when the entry does not lie inside the buffer or is not of a float dtype.
        """
        dtype = getattr(torch, entry.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise WeightSyncError(f"{entry.name} has dtype {entry.dtype}; weights must be of a float dtype")
        num_bytes = dtype.itemsize * torch.Size(entry.shape).numel()
        if entry.offset + num_bytes > self.capacity:
            raise WeightSyncError(f"{entry.name} ends beyond the {self.capacity} bytes of the weight buffer")
        return self._bytes[entry.offset : entry.offset + num_bytes].view(dtype).view(entry.shape)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is a view of the bytes as they are mapped now."""
        return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() == self._bytes.data_ptr()

    def close(self) -> None:
        """Gives the sender's descriptor back; the pages go when the last view of them does."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self._bytes = torch.empty(0, dtype=torch.uint8)


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def digest(name: str, tensor: torch.Tensor) -> int:
    """xxh3-64 of name, dtype, shape and raw bytes: renamed or reshaped tensors differ even when their bytes agree."""
    hasher = xxhash.xxh3_64(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    hasher.update(flat.view(torch.uint8).numpy().data)
    return hasher.intdigest()


def _map(fd: int, capacity: int) -> torch.Tensor:
    # torch keeps the mapping alive as long as a tensor views it, so remapping never pulls memory from under one
    return torch.frombuffer(mmap.mmap(fd, capacity), dtype=torch.uint8)
