"""What a start on GPUs is asked before any rank, engine or model is there: as many GPUs as ranks, and memory for the recipe."""

from __future__ import annotations

import dataclasses
import os

import torch

from megatron_reheat.config import Config
from megatron_reheat.errors import ConfigError
from megatron_reheat.model.backend import choose_backend


def check_gpu_start(config: Config, world_size: int, *, force: bool) -> None:
    """The memory rule of `reheat check` with this machine's own GPUs; nothing to check on a machine without any.

    Args:
        world_size: ranks of the run, on all nodes. Those of this node are torchrun's LOCAL_WORLD_SIZE, or all.
        force: leaves out the estimate of memory, which may be wrong.

    Raises:
        ConfigError: naming the keys to change, or the package that Megatron cannot work with (`choose_backend`).
    """
    if not torch.cuda.is_available():
        return
    ranks, count = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), torch.cuda.device_count()
    if ranks > count:
        raise ConfigError(
            f"the layout asks for {ranks} ranks on this machine, which has {count} GPUs; lower parallel.data, "
            "parallel.tensor or parallel.context, or start it on more machines (reheat slurm --nodes)"
        )
    # before Megatron is imported, which some of what it finds would not let it be
    choose_backend(config.model.attention)
    if force:
        return
    # not before: they bring Megatron, which a launcher on the CPU has no use for
    from megatron_reheat.cluster.gpus import GIB, GPUS
    from megatron_reheat.cluster.preflight import estimate_on, require_fit

    device = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0")))
    # times play no part here, so that any kind will do for them
    gpu = dataclasses.replace(GPUS["h100-80g"], memory_gib=device.total_memory / GIB)
    try:
        require_fit(estimate_on(gpu, config, gpus=world_size), device.name)
    except ConfigError as error:
        raise ConfigError(f"{error}; --force starts it all the same") from None
