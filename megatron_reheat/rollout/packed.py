"""Tensors laid end to end in a block of bytes, described so that the other side can take them out again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import xxhash

from megatron_reheat.errors import WeightSyncError

ALIGNMENT = 64


@dataclass(frozen=True)
class Entry:
    """One tensor inside a block. `dtype` is the name of a torch dtype; `digest` is None when nobody verifies."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    digest: int | None = None


def write_tensor(block: torch.Tensor, name: str, tensor: torch.Tensor, offset: int, verify: bool) -> Entry:
    """Copies a tensor of any device into `block`, uint8 [bytes]; with `verify` the digest is that of the source."""
    tensor = tensor.detach()
    entry = Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset)
    read_tensor(block, entry).copy_(tensor)
    if not verify:
        return entry
    return Entry(entry.name, entry.dtype, entry.shape, offset, digest(name, tensor))


def read_tensor(block: torch.Tensor, entry: Entry) -> torch.Tensor:
    """The tensor of `entry` as a view of `block`, uint8 [bytes].

    Raises:
        WeightSyncError: when the entry does not lie inside the block or is not of a float dtype.
    """
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise WeightSyncError(f"{entry.name} has dtype {entry.dtype}; weights must be of a float dtype")
    num_bytes = dtype.itemsize * torch.Size(entry.shape).numel()
    if entry.offset + num_bytes > len(block):
        raise WeightSyncError(f"{entry.name} ends beyond the {len(block)} bytes of the weight buffer")
    return block[entry.offset : entry.offset + num_bytes].view(dtype).view(entry.shape)


def aligned(num_bytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def digest(name: str, tensor: torch.Tensor) -> int:
    """xxh3-64 of name, dtype, shape and raw bytes: renamed or reshaped tensors differ even when their bytes agree."""
    hasher = xxhash.xxh3_64(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    hasher.update(flat.view(torch.uint8).numpy().data)
    return hasher.intdigest()
