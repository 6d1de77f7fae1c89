"""vLLM's end of the CPU weight transfer: one worker of a server takes broadcast blocks and loads what is in them.

Implements vLLM's `WeightTransferEngine` as its NCCL backend does, with every name, shape and, when sent, digest checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from megatron_reheat.rollout.packed import Entry, read_tensor
from megatron_reheat.rollout.reload import WeightLoader
from megatron_reheat.rollout.server.gloo_group import GlooGroup, make_store
from megatron_reheat.rollout.server.sender import address_towards


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where the trainer waits; this server's workers are ranks `rank_offset` and up."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """One block: the fields of its entries, and its size; or, with `last`, that there are no more."""

    entries: list[dict[str, Any]]
    num_bytes: int
    last: bool = False


class GlooWeightTransfer(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """One worker's end: a member of the trainer's group from `init_transfer_engine` until `shutdown`."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._group: GlooGroup | None = None
        self._loader = WeightLoader(model, vllm_config, vllm_config.model_config.model)

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        i = init_info
        store = make_store(i.master_port, i.world_size, i.timeout_s, host=i.master_address, is_master=False)
        address = address_towards(i.master_address)
        self._group = GlooGroup(store, rank, i.world_size, i.timeout_s, address=address)

    def start_weight_update(self) -> None:
        self._loader.begin()

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        if self._group is None:
            raise RuntimeError("no weight transfer is set up; call init_weight_transfer_engine first")
        if update_info.last:
            self._loader.check()  # vLLM ends an update that fails here, and not one that fails in its finish
            return
        block = torch.empty(update_info.num_bytes, dtype=torch.uint8)
        self._group.broadcast(block)
        entries = [Entry(**{**fields, "shape": tuple(fields["shape"])}) for fields in update_info.entries]
        self._loader.load((entry, read_tensor(block, entry)) for entry in entries)

    def finish_weight_update(self) -> None:
        self._loader.commit()

    def shutdown(self) -> None:
        self._group = None
