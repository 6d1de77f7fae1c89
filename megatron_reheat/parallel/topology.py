"""Where this process stands in the layout, and the few collectives on Python objects the stages need.

The sole reader of Megatron's parallel state: everyone else asks the frozen `Topology`.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_reheat.config import Config
from megatron_reheat.config_fields import Switch
from megatron_reheat.errors import ReheatError
from megatron_reheat.parallel import cpu
from megatron_reheat.parallel.kernel_order import order_kernels

T = TypeVar("T")


@dataclass(frozen=True)
class Topology:
    """One rank's coordinates and process groups.

    A replica is one tensor x pipeline block: one copy of the model. With context parallelism several share a micro-batch: there
    are data x context replicas, in Megatron's order, those of one micro-batch next to each other. The ranks of `peer_group`
    hold the same part of the model, one of each replica, in the same order.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    context_rank: int
    context_size: int
    data_rank: int
    data_size: int
    replica_rank: int
    num_replicas: int
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    context_group: dist.ProcessGroup
    peer_group: dist.ProcessGroup
    replica_group: dist.ProcessGroup

    def is_on(self, setting: Switch) -> bool:
        """Of what is for GPUs where the recipe does not say."""
        return self.device.type == "cuda" if setting == "auto" else setting

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run's log."""
        return self.rank == 0

    @property
    def is_replica_leader(self) -> bool:
        """The first rank of a replica drives its vLLM engine and its verifiers."""
        return self.tensor_rank == 0 and self.pipeline_rank == 0

    @property
    def is_first_stage(self) -> bool:
        """Whether its part of the pipeline begins with the embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether its part of the pipeline ends with the head, where losses are made."""
        return self.pipeline_rank == self.pipeline_size - 1

    def share_from_leaders(self, mine: T | None, error: str | None = None) -> list[T]:
        """All-gathers one object per replica, in their order, to every rank.

        `mine` matters on replica leaders only. If any leader passes `error`, every rank raises it: nobody is left waiting
        in a collective for a rank that has already failed.

        Raises:
            ReheatError: the first leader's error, the same on every rank.
        """
        gathered: list[Any] = [None] * self.num_replicas
        if self.is_replica_leader:
            dist.all_gather_object(gathered, (mine, error), group=self.peer_group)
        if self.tensor_size * self.pipeline_size > 1:
            source = dist.get_global_rank(self.replica_group, 0)
            dist.broadcast_object_list(gathered, src=source, group=self.replica_group)
        return _values(gathered)

    def share_from_all(self, mine: T | None, error: str | None = None) -> list[T]:
        """The same from every rank to every rank."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, (mine, error))
        return _values(gathered)

    def gather_from_last_stages(self, mine: T) -> list[T]:
        """All-gathers one object per replica from the last pipeline stage (where losses live) to every rank."""
        gathered: list[Any] = [None] * self.num_replicas
        if self.is_last_stage:
            dist.all_gather_object(gathered, mine, group=self.peer_group)
        if self.pipeline_size > 1:
            source = dist.get_global_rank(self.pipeline_group, self.pipeline_size - 1)
            dist.broadcast_object_list(gathered, src=source, group=self.pipeline_group)
        return gathered

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on any."""
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def barrier(self) -> None:
        """Returns when every rank of the run has come here."""
        dist.barrier()


def _values(gathered: list[tuple[Any, str | None]]) -> list[Any]:
    errors = [e for _, e in gathered if e is not None]
    if errors:
        failure = ReheatError(errors[0])
        failure.on_every_rank = True
        raise failure
    return [value for value, _ in gathered]


def initialize(config: Config) -> Topology:
    """Joins the process group torchrun prepared (or makes a group of one) and lays out TP x PP x CP x DP.

    Raises:
        ConfigError: WORLD_SIZE does not fit the configured layout.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config.data_parallel(world_size)
    order_kernels(config)
    on_cpu = cpu.install()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if on_cpu:
        # ranks that each take every core fight each other to a crawl
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    else:
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
        alone: dict[str, Any] = (
            {"store": dist.HashStore(), "rank": 0, "world_size": 1} if "RANK" not in os.environ else {}
        )
        dist.init_process_group(backend, timeout=timedelta(seconds=config.parallel.timeout_s), **alone)
    virtual = config.parallel.virtual_pipeline
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=config.parallel.context,
        distributed_timeout_minutes=math.ceil(config.parallel.timeout_s / 60),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(config.run.seed + 1)
    return current(torch.device("cpu") if on_cpu else torch.device("cuda", local_rank))


def current(device: torch.device) -> Topology:
    """Reads Megatron's parallel state once."""
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        device=device,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        replica_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        num_replicas=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        context_group=parallel_state.get_context_parallel_group(),
        peer_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        replica_group=parallel_state.get_model_parallel_group(),
    )


def new_peer_group(topology: Topology, timeout_s: float) -> dist.ProcessGroup:
    """A gloo group of the same ranks as `peer_group`, for a thread of its own: collectives of two threads must not meet in one
    group. A collective of all ranks."""
    mine = tuple(dist.get_process_group_ranks(topology.peer_group))
    groups = [
        (ranks, dist.new_group(ranks, timeout=timedelta(seconds=timeout_s), backend="gloo"))
        for ranks in sorted(set(topology.share_from_all(mine)))
    ]
    found: dist.ProcessGroup = next(group for ranks, group in groups if ranks == mine)
    return found


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether this is how a collective, or the meeting before the first, fails for want of another rank.

    Gloo's errors are plain RuntimeErrors. NCCL's are of one class, whatever is wrong, and mostly something else is.
    """
    is_meeting = isinstance(error, dist.DistStoreError | dist.DistNetworkError)
    return is_meeting or any(words in str(error) for words in ("gloo/transport", "ncclRemoteError"))


def finalize() -> None:
    """Leaves the process groups; safe to call twice."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
