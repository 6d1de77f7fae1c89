"""Weights cross from trainer to engine in anonymous shared memory that both processes map.

A memfd has no name: nothing is left behind whatever dies, and a small /dev/shm mount does not limit it. Its pages are
allocated when first written, so the capacity costs nothing until it is used.
"""

from __future__ import annotations

import mmap
import os

import torch

from megatron_reheat.rollout.packed import Entry, read_tensor, write_tensor


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
        return write_tensor(self._bytes, name, tensor, offset, verify)

    def read(self, entry: Entry) -> torch.Tensor:
        """The tensor of `entry` as a view of the shared bytes; raises WeightSyncError as `read_tensor` does."""
        return read_tensor(self._bytes, entry)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is a view of the bytes as they are mapped now."""
        return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() == self._bytes.data_ptr()

    def close(self) -> None:
        """Gives the sender's descriptor back; the pages go when the last view of them does."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self._bytes = torch.empty(0, dtype=torch.uint8)


def _map(fd: int, capacity: int) -> torch.Tensor:
    # torch keeps the mapping alive as long as a tensor views it, so remapping never pulls memory from under one
    return torch.frombuffer(mmap.mmap(fd, capacity), dtype=torch.uint8)
