"""Starts what a run samples from, as `rollout.mode` says."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from megatron_reheat.config import Config, RolloutConfig
from megatron_reheat.errors import ConfigError, ReheatError
from megatron_reheat.model.provider import read_hf_config
from megatron_reheat.parallel.seats import engine_seats
from megatron_reheat.parallel.topology import Topology
from megatron_reheat.ports import free_port
from megatron_reheat.rollout.embedded import EmbeddedEngine
from megatron_reheat.rollout.engine import RolloutEngine
from megatron_reheat.rollout.gpus import visible_gpus
from megatron_reheat.rollout.server.fleet import ServerFleet, new_label
from megatron_reheat.rollout.server.process import ServerProcess, transfer_backend
from megatron_reheat.rollout.server.servers import Servers
from megatron_reheat.rollout.server.weights import ServerWeights
from megatron_reheat.run_folder import RunFolder
from megatron_reheat.stages.inputs import Inputs


def start_sampler(config: Config, topology: Topology, inputs: Inputs) -> RolloutEngine | None:
    """This rank's engine, starting; None where it holds none (`engine_seats`). A collective over all ranks.

    Raises:
        ConfigError: `rollout` asks for what this machine does not have.
    """
    rollout = config.rollout.model_copy(update={"max_model_len": inputs.max_model_len})
    if rollout.mode == "server":
        return _start_fleet(config, rollout, topology, inputs)
    seats = engine_seats(topology, rollout)
    if not seats.is_leader:
        return None
    ranks_per_engine = topology.world_size // seats.count
    first = topology.local_rank
    return EmbeddedEngine(
        str(inputs.hf_folder),
        rollout,
        dtype=config.model.dtype,
        log_file=RunFolder(config.run.path).logs / f"vllm-{seats.index}.log",
        seed=config.run.seed,
        local_engines=max(1, topology.local_world_size // ranks_per_engine),
        gpus=range(first, first + rollout.tensor) if topology.device.type == "cuda" else (),
    )


def _start_fleet(config: Config, rollout: RolloutConfig, topology: Topology, inputs: Inputs) -> ServerFleet | None:
    leads = topology.is_replica_leader and topology.data_rank == 0
    makers: dict[str, Callable[[], ServerProcess]] = {}
    urls, label, error = list(rollout.servers), new_label(), None
    if leads and not urls:
        try:
            makers = _server_makers(config, rollout, topology, inputs)
            urls = list(makers)
        except ReheatError as failure:
            error = str(failure)
    urls, label = topology.share_from_leaders((urls, label), error)[0]
    if not topology.is_replica_leader:
        return None
    on_cpu = topology.device.type == "cpu"
    hf = read_hf_config(inputs.hf_folder)
    servers = Servers(urls, makers, rollout, hf, transfer_backend(on_cpu))
    return ServerFleet(
        servers,
        hf.vocab_size,
        rollout,
        label=label,
        weights=ServerWeights(servers, rollout, on_cpu) if leads else None,
        num_clients=topology.data_size,
    )


def _server_makers(
    config: Config, rollout: RolloutConfig, topology: Topology, inputs: Inputs
) -> dict[str, Callable[[], ServerProcess]]:
    """How each server of ours is started, by URL. On GPUs they take the devices after the trainer's."""
    count = rollout.num_servers
    if topology.world_size > topology.local_world_size:
        raise ConfigError(
            "rollout.servers is empty, and servers can be started by the run only where it has a single node; start them "
            "on their own nodes (reheat serve, reheat slurm --rollout-nodes) and name them in rollout.servers"
        )
    on_cpu = topology.device.type == "cpu"
    first_gpu = topology.local_world_size
    needed = first_gpu + count * rollout.tensor
    devices = visible_gpus()
    if not on_cpu and len(devices) < needed:
        raise ConfigError(
            f"{first_gpu} trainer ranks and rollout.num_servers {count} x rollout.tensor {rollout.tensor} need {needed} "
            f"GPUs, and this machine has {len(devices)}; lower one of them, or use rollout.mode=embedded"
        )
    folder = RunFolder(config.run.path)
    makers: dict[str, Callable[[], ServerProcess]] = {}
    for k in range(count):
        port = free_port()
        first = first_gpu + k * rollout.tensor
        gpus = () if on_cpu else devices[first : first + rollout.tensor]
        makers[f"http://127.0.0.1:{port}"] = partial(
            ServerProcess,
            str(inputs.hf_folder),
            read_hf_config(inputs.hf_folder),
            rollout,
            dtype=config.model.dtype,
            seed=config.run.seed,
            port=port,
            log_file=folder.logs / f"vllm-{k}.log",
            gpus=gpus,
            threads=rollout.threads or max(1, len(os.sched_getaffinity(0)) // count),
        )
    return makers
