"""Starts what a run samples from, as `rollout.mode` says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_reheat.config import Config, RolloutConfig
from megatron_reheat.errors import ConfigError
from megatron_reheat.model.architecture import Architecture, kv_cache_bytes
from megatron_reheat.model.hf_reader import HFReader
from megatron_reheat.model.hf_weights import iter_folder_weights
from megatron_reheat.model.provider import read_hf_config
from megatron_reheat.parallel.seats import engine_seats
from megatron_reheat.parallel.topology import Topology
from megatron_reheat.rollout.embedded import EmbeddedEngine
from megatron_reheat.rollout.head_start import HeadStart
from megatron_reheat.rollout.rollout_engine import RolloutEngine
from megatron_reheat.run_folder import RunFolder
from megatron_reheat.stages.inputs import FrozenModel, Inputs

Named = tuple[str, Tensor]


@dataclass(frozen=True)
class EngineModel:
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
    return _start(EngineModel(inputs.hf_folder, rollout, config.model.dtype), config, topology, head_start)


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
    what = EngineModel(model.folder.path, rollout, model.dtype, f"vllm-{name}", keys, name)
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
    model: EngineModel, config: Config, topology: Topology, head_start: HeadStart | None = None
) -> RolloutEngine | None:
    rollout, on_gpu = model.rollout, topology.device.type == "cuda"
    if rollout.mode == "server":
        # here, because servers' clients take a moment to import, and runs with engines of their own have no use for them
        from megatron_reheat.stages.server_engines import start_fleet

        return start_fleet(model, config, topology)
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
