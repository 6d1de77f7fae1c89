"""A gloo group of one trainer and the workers of all servers, beside whatever groups either side has."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore


class GlooGroup:
    """Joins on construction, which waits for every member; rank 0 is the trainer. Listens on `address` alone: neither the group
    nor its store asks who it talks to.

    torch's own rendezvous is not used: under torchrun it takes rank 0 for a client of torchrun's store, and hangs.
    """

    def __init__(self, store: TCPStore, rank: int, world_size: int, timeout_s: float, *, address: str) -> None:
        self._store = store  # the group does not keep it alive
        gloo: Any = ProcessGroupGloo  # whose options have no types
        options = gloo._Options()
        options._timeout = timedelta(seconds=timeout_s)
        options._devices = [gloo.create_device(hostname=address)]
        self._group = gloo(PrefixStore("weights", store), rank, world_size, options)

    def broadcast(self, block: torch.Tensor) -> None:
        """Fills `block` on every other member with rank 0's."""
        options = BroadcastOptions()
        options.rootRank = 0
        self._group.broadcast([block], options).wait()


def make_store(port: int, world_size: int, timeout_s: float, *, host: str, is_master: bool) -> TCPStore:
    """The members' meeting point; the master, which listens on `host` alone, gets a free port for 0: `store.port`."""
    timeout = timedelta(seconds=timeout_s)
    if not is_master:
        return TCPStore(host, port, world_size, False, timeout=timeout, wait_for_workers=False)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family)  # the store's own would be open on every interface
    port = listener.getsockname()[1]
    return TCPStore(
        host, port, world_size, True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )
