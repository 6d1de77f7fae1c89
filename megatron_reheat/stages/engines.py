"""Starts what a run samples from, as `rollout.mode` says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_reheat.config import Config, RolloutConfig
from megatron_reheat.errors import ConfigError, ReheatError
from megatron_reheat.model.architecture import Architecture, kv_cache_bytes
from megatron_reheat.model.hf_reader import HFReader
from megatron_reheat.model.hf_weights import iter_folder_weights
from megatron_reheat.model.provider import read_hf_config
from megatron_reheat.parallel.seats import engine_seats
from megatron_reheat.parallel.topology import Topology
from megatron_reheat.ports import free_port
from megatron_reheat.rollout.embedded import EmbeddedEngine
from megatron_reheat.rollout.gpus import visible_gpus
from megatron_reheat.rollout.head_start import HeadStart
from megatron_reheat.rollout.rollout_engine import RolloutEngine
from megatron_reheat.rollout.server.fleet import ServerFleet, new_label
from megatron_reheat.rollout.server.guard import own_token, server_token
from megatron_reheat.rollout.server.process import ServerProcess, transfer_backend
from megatron_reheat.rollout.server.servers import Servers
from megatron_reheat.rollout.server.weights import ServerWeights
from megatron_reheat.run_folder import RunFolder
from megatron_reheat.stages.inputs import FrozenModel, Inputs

Named = tuple[str, Tensor]


@dataclass(frozen=True)
class _Model:
    """What engines are started for. `keys` of the recipe name its servers and its folder; a frozen model has a `name`."""

    folder: Path
    rollout: RolloutConfig
    dtype: str
    log: str = "vllm"
    keys: tuple[str, str] = ("rollout.servers", "model.hf_path")
    name: str | None = None

    @property
    def frozen(self) -> bool:
        return self.name is not None


def start_sampler(
    config: Config, topology: Topology, inputs: Inputs, head_start: HeadStart | None = None
) -> RolloutEngine | None:
    """This rank's engine for the policy, starting; None where it holds none (`engine_seats`). A collective over all ranks.

    Raises:
        ConfigError: `rollout` asks for what this machine does not have.
    """
    rollout = config.rollout.model_copy(update={"max_model_len": inputs.max_model_len})
    return _start(_Model(inputs.hf_folder, rollout, config.model.dtype), config, topology, head_start)


def start_frozen(
    name: str, config: Config, topology: Topology, inputs: Inputs, head_start: HeadStart | None = None
) -> RolloutEngine | None:
    """The same for the model `rl.samplers.NAME`, with a dtype and a context of its own.

    On the trainer's GPUs it is not started before it is used: of engines that start at once, each would take the memory that
    the other allocates for its own.
    """
    model = inputs.frozen[name]
    servers = config.rl.sampler_servers.get(name, ())
    own = {"max_model_len": model.max_model_len, "dtype": model.dtype, "servers": servers}
    rollout = config.rollout.model_copy(update=own)
    keys = (f"rl.sampler_servers.{name}", f"rl.samplers.{name}")
    what = _Model(model.folder.path, rollout, model.dtype, f"vllm-{name}", keys, name)
    return _start(what, config, topology)


def frozen_weights(model: FrozenModel, rollout: RolloutConfig, topology: Topology) -> Callable[[], Iterator[Named]]:
    """What gives a frozen model's weights anew whenever it is called: on the trainer's device if they go to servers."""
    reader, dtype = HFReader(model.folder.path), getattr(torch, model.dtype)
    device = topology.device if rollout.mode == "server" else torch.device("cpu")

    def weights() -> Iterator[Named]:
        for name, tensor in iter_folder_weights(model.folder.hf, reader, dtype):
            yield name, tensor.to(device)

    return weights


def _start(
    model: _Model, config: Config, topology: Topology, head_start: HeadStart | None = None
) -> RolloutEngine | None:
    rollout, on_gpu = model.rollout, topology.device.type == "cuda"
    if rollout.mode == "server":
        return _start_fleet(model, config, topology)
    seats = engine_seats(topology, rollout)
    if not seats.is_leader:
        return None
    if on_gpu and rollout.kv_cache_mb is None:
        # by its share alone vLLM would measure what is free while the trainer, and another engine, take memory as well
        gib = torch.cuda.get_device_properties(topology.device).total_memory / 2**30
        rollout = with_fixed_cache(rollout, Architecture.from_hf(read_hf_config(model.folder)), model.dtype, gib)
    ranks_per_engine = topology.world_size // seats.count
    first = topology.local_rank
    return EmbeddedEngine(
        str(model.folder),
        rollout,
        dtype=model.dtype,
        log_file=RunFolder(config.run.path).logs / f"{model.log}-{seats.index}.log",
        seed=config.run.seed,
        local_engines=max(1, topology.local_world_size // ranks_per_engine),
        gpus=range(first, first + rollout.tensor) if on_gpu else (),
        frozen=model.frozen,
        start=not (model.frozen and on_gpu),
        head_start=head_start,
    )


def with_fixed_cache(rollout: RolloutConfig, model: Architecture, dtype: str, gpu_gib: float) -> RolloutConfig:
    """With the size of the KV cache in place of the share of a GPU that it follows from.

    Raises:
        ConfigError: the share does not hold the weights.
    """
    cache = int(kv_cache_bytes(model, rollout, dtype, gpu_gib)) >> 20
    if cache <= 0:
        raise ConfigError(
            f"rollout.gpu_memory_utilization {rollout.gpu_memory_utilization:g} of {gpu_gib:.0f} GiB does not hold vLLM's "
            "weights; raise it, or rollout.tensor with rollout.mode=colocated"
        )
    return rollout.model_copy(update={"kv_cache_mb": cache})


def _start_fleet(model: _Model, config: Config, topology: Topology) -> ServerFleet | None:
    rollout = model.rollout
    leads = topology.is_replica_leader and topology.replica_rank == 0
    makers: dict[str, Callable[[], ServerProcess]] = {}
    urls, label, token, error = list(rollout.servers), new_label(), None, None
    if leads:
        try:
            token = server_token() if urls else own_token()
            if not urls:
                makers = _server_makers(model, config, topology, token)
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


def _server_makers(
    model: _Model, config: Config, topology: Topology, token: str | None
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
