"""A gloo group of one trainer and the workers of all servers, beside whatever groups either side has."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore


class GlooGroup:
    """Joins on construction, which waits for every member; rank 0 is the trainer.

    torch's own rendezvous is not used: under torchrun it takes rank 0 for a client of torchrun's store, and hangs.
    """

    def __init__(self, store: TCPStore, rank: int, world_size: int, timeout_s: float) -> None:
        self._store = store  # the group does not keep it alive
        timeout = timedelta(seconds=timeout_s)
        self._group: Any = ProcessGroupGloo(PrefixStore("weights", store), rank, world_size, timeout)

    def broadcast(self, block: torch.Tensor) -> None:
        """Fills `block` on every other member with rank 0's."""
        options = BroadcastOptions()
        options.rootRank = 0
        self._group.broadcast([block], options).wait()


def make_store(port: int, world_size: int, timeout_s: float, *, host: str, is_master: bool) -> TCPStore:
    """The members' meeting point; the master with port 0 gets a free one, which is then `store.port`."""
    return TCPStore(host, port, world_size, is_master, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
