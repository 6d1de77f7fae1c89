"""What the ranks of a tensor-parallel group tell each other about their vocabulary shards."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def gather_shards(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[...] -> [TP, ...], in rank order on every rank."""
    if group is None or dist.get_world_size(group) == 1:
        return local[None]
    shards = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, local, group=group)
    return torch.stack(shards)
