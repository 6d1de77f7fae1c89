"""Starts servers to sample from, or finds those that the recipe names (`rollout.mode` server)."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from megatron_reheat.config import Config
from megatron_reheat.errors import ConfigError, ReheatError
from megatron_reheat.model.provider import read_hf_config
from megatron_reheat.parallel.topology import Topology
from megatron_reheat.ports import free_port
from megatron_reheat.rollout.gpus import visible_gpus
from megatron_reheat.rollout.server.fleet import ServerFleet, new_label
from megatron_reheat.rollout.server.guard import own_token, server_token
from megatron_reheat.rollout.server.process import ServerProcess, transfer_backend
from megatron_reheat.rollout.server.servers import Servers
from megatron_reheat.rollout.server.weights import ServerWeights
from megatron_reheat.run_folder import RunFolder
from megatron_reheat.stages.engines import EngineModel


def start_fleet(model: EngineModel, config: Config, topology: Topology) -> ServerFleet | None:
    """The servers of a run, or this rank's client of them; None where it holds none. A collective over all ranks.

    Raises:
        ConfigError: `rollout` asks for what this machine does not have.
    """
    rollout = model.rollout
    leads = topology.is_replica_leader and topology.replica_rank == 0
    makers: dict[str, Callable[[], ServerProcess]] = {}
    urls, label, token, error = list(rollout.servers), new_label(), None, None
    if leads:
        try:
            token = server_token() if urls else own_token()
            if not urls:
                makers = server_makers(model, config, topology, token)
                urls = list(makers)
        except ReheatError as failure:
            error = str(failure)
    urls, label, token = topology.share_from_leaders((urls, label, token), error)[0]
    if not topology.is_replica_leader:
        return None
    on_cpu = topology.device.type == "cpu"
    hf = read_hf_config(model.folder)
    servers = Servers(urls, makers, rollout, hf, transfer_backend(on_cpu), token=token, keys=model.keys)
    return ServerFleet(
        servers,
        hf.vocab_size,
        rollout,
        label=label,
        weights=ServerWeights(servers, rollout, on_cpu) if leads else None,
        num_clients=topology.num_replicas,
    )


def server_makers(
    model: EngineModel, config: Config, topology: Topology, token: str | None
) -> dict[str, Callable[[], ServerProcess]]:
    """How each server of ours is started, by URL. On GPUs they take the devices after the trainer's, model by model."""
    rollout, (key, _) = model.rollout, model.keys
    count = rollout.num_servers
    if topology.world_size > topology.local_world_size:
        raise ConfigError(
            f"{key} is empty, and servers can be started by the run only where it has a single node; start them on their own "
            f"nodes (reheat serve, reheat slurm --rollout-nodes) and name them in {key}"
        )
    on_cpu = topology.device.type == "cpu"
    models = _models_started_here(config)
    first_gpu = topology.local_world_size + count * rollout.tensor * models.index(key)
    needed = topology.local_world_size + count * rollout.tensor * len(models)
    devices = visible_gpus()
    if not on_cpu and len(devices) < needed:
        each = f" for each of {len(models)} models" if len(models) > 1 else ""
        raise ConfigError(
            f"{topology.local_world_size} trainer ranks and rollout.num_servers {count} x rollout.tensor {rollout.tensor}"
            f"{each} need {needed} GPUs, and this machine has {len(devices)}; lower one of them, or use "
            "rollout.mode=embedded"
        )
    folder = RunFolder(config.run.path)
    makers: dict[str, Callable[[], ServerProcess]] = {}
    for k in range(count):
        port = free_port()
        first = first_gpu + k * rollout.tensor
        gpus = () if on_cpu else devices[first : first + rollout.tensor]
        makers[f"http://127.0.0.1:{port}"] = partial(
            ServerProcess,
            str(model.folder),
            read_hf_config(model.folder),
            rollout,
            dtype=model.dtype,
            seed=config.run.seed,
            port=port,
            log_file=folder.logs / f"{model.log}-{k}.log",
            token=token,
            gpus=gpus,
            threads=rollout.threads or max(1, len(os.sched_getaffinity(0)) // count),
        )
    return makers


def _models_started_here(config: Config) -> list[str]:
    """Those that no servers are named for, by the key that would name them."""
    policy = [] if config.rollout.servers else ["rollout.servers"]
    return policy + [
        f"rl.sampler_servers.{name}" for name in config.rl.samplers if not config.rl.sampler_servers.get(name)
    ]
