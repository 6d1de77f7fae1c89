"""The trainer's end of a weight transfer to vLLM servers: what it tells them, and the broadcast that follows.

On CUDA the other end is vLLM's own NCCL backend, on CPU ours (`gloo_transfer`). Both take one block of tensors per
request, several requests per update.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch

from megatron_reheat.errors import ConfigError
from megatron_reheat.ports import free_port
from megatron_reheat.rollout.packed import aligned, write_tensor
from megatron_reheat.rollout.server.gloo_group import GlooGroup, make_store

NCCL_POLL_S = 0.0005
Named = tuple[str, torch.Tensor]


class WeightSender(Protocol):
    """Rank 0 of a group whose other members are the servers' workers.

    `can_verify`: digests can be compared. `can_retry`: a server whose update was given up can take the next one.
    `last_info`: what `/update_weights` is told when everything was sent, if it is told anything.
    """

    can_verify: bool
    can_retry: bool

    @property
    def last_info(self) -> dict[str, Any] | None:
        """See the class; None where it is told nothing."""
        ...

    def init_info(self, rank_offset: int) -> dict[str, Any]:
        """What a server's `/init_weight_transfer_engine` is told; its workers become ranks `rank_offset` and up."""
        ...

    def join(self) -> None:
        """Waits until every worker has joined, which they do while they answer that request."""
        ...

    def pack(self, tensors: Sequence[Named], verify: bool) -> tuple[dict[str, Any], Sequence[torch.Tensor]]:
        """What `/update_weights` is told of these tensors, and what `send` is to be given."""
        ...

    def send(self, packed: Sequence[torch.Tensor], has_failed: Callable[[], bool]) -> None:
        """Broadcasts to the workers, which receive while they answer `/update_weights`.

        Raises:
            RuntimeError: the broadcast broke, or `has_failed` says that a worker will not take part in it.
        """
        ...

    def close(self) -> None:
        """Leaves the group, also in the middle of a broadcast."""
        ...


class GlooSender:
    """Between CPUs; a block carries digests when it is to be verified."""

    can_verify = True
    can_retry = True

    def __init__(self, address: str, num_workers: int, timeout_s: float) -> None:
        self._address, self._world_size, self._timeout_s = address, 1 + num_workers, timeout_s
        self._store = make_store(0, self._world_size, timeout_s, host=address, is_master=True)
        self._group: GlooGroup | None = None

    @property
    def last_info(self) -> dict[str, Any] | None:
        return {"entries": [], "num_bytes": 0, "last": True}

    def init_info(self, rank_offset: int) -> dict[str, Any]:
        return {
            "master_address": self._address,
            "master_port": self._store.port,
            "rank_offset": rank_offset,
            "world_size": self._world_size,
            "timeout_s": self._timeout_s,
        }

    def join(self) -> None:
        self._group = GlooGroup(self._store, 0, self._world_size, self._timeout_s, address=self._address)

    def pack(self, tensors: Sequence[Named], verify: bool) -> tuple[dict[str, Any], Sequence[torch.Tensor]]:
        block = torch.empty(sum(aligned(t.nbytes) for _, t in tensors), dtype=torch.uint8)
        entries, offset = [], 0
        for name, tensor in tensors:
            entries.append(asdict(write_tensor(block, name, tensor, offset, verify)))
            offset += aligned(tensor.nbytes)
        return {"entries": entries, "num_bytes": len(block)}, [block]

    def send(self, packed: Sequence[torch.Tensor], has_failed: Callable[[], bool]) -> None:
        assert self._group is not None
        for block in packed:
            self._group.broadcast(block)  # breaks by itself when a member is gone

    def close(self) -> None:
        self._group = None


class NcclSender:
    """Between GPUs, from the current device; vLLM's NCCL backend receives. Nothing is copied to the host.

    Relies on vLLM 0.32: `weight_transfer/nccl_common.py` `trainer_init` (rank 0 of a stateless group) and
    `weight_transfer/nccl_engine.py` `NCCLWeightTransferEngine.receive_weights` with `packed` off: one broadcast from
    rank 0 per name, in the order of `names`, into a tensor of the announced dtype and shape.
    """

    # the receiving side is vLLM's: it compares nothing, and takes tensors of a given-up update for the next one's
    can_verify = False
    can_retry = False

    def __init__(self, address: str, num_workers: int) -> None:
        if not torch.cuda.is_available():
            raise ConfigError("weights can be sent over NCCL from a GPU only, and this machine has none")
        self._port = free_port()
        self._address, self._world_size = address, 1 + num_workers
        self._communicator: Any = None

    @property
    def last_info(self) -> dict[str, Any] | None:
        return None

    def init_info(self, rank_offset: int) -> dict[str, Any]:
        return {
            "master_address": self._address,
            "master_port": self._port,
            "rank_offset": rank_offset,
            "world_size": self._world_size,
            "packed": False,
        }

    def join(self) -> None:
        # the one place where the trainer imports vLLM: these modules make no engine and touch no group of ours
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        self._communicator = trainer_init(
            {"master_address": self._address, "master_port": self._port, "world_size": self._world_size}
        )

    def pack(self, tensors: Sequence[Named], verify: bool) -> tuple[dict[str, Any], Sequence[torch.Tensor]]:
        info = {
            "names": [name for name, _ in tensors],
            "dtype_names": [str(t.dtype).removeprefix("torch.") for _, t in tensors],
            "shapes": [list(t.shape) for _, t in tensors],
        }
        return info, [t.detach().contiguous() for _, t in tensors]

    def send(self, packed: Sequence[torch.Tensor], has_failed: Callable[[], bool]) -> None:
        stream = torch.cuda.current_stream()
        for tensor in packed:
            self._communicator.broadcast(tensor, src=0, stream=stream)
        sent = torch.cuda.Event()
        sent.record(stream)
        # the tensors may be overwritten once this returns; NCCL itself would wait for a dead member for ever
        while not sent.query():
            if has_failed():
                self.close()
                raise RuntimeError("a server failed while it was receiving weights")
            time.sleep(NCCL_POLL_S)

    def close(self) -> None:
        if self._communicator is not None:
            self._communicator.destroy()  # vLLM's aborts, which ends a broadcast under way
            self._communicator = None


def address_towards(host: str, key: str = "rollout.servers") -> str:
    """This machine's address as `host` sees it, without sending anything. `key` of the recipe names the host, for errors.

    Raises:
        ConfigError: the name does not resolve or has no route.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    except OSError as error:
        raise ConfigError(f"{key}: {host} cannot be reached from here: {error}") from None
