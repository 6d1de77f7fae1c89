"""`reheat train`: from a recipe to processes that run it, and one of these processes.

Torch and Megatron-Core are imported as late as can be, so that engines which are started before import vLLM meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_reheat.cluster.launch import (
    become_rank,
    heed_stop_signals,
    is_launched,
    is_launchers_own,
    launch_here,
    reporting_errors,
)
from megatron_reheat.config import Config
from megatron_reheat.large_imports import large_imports
from megatron_reheat.phases import announce, let_announce
from megatron_reheat.recipe import load_config
from megatron_reheat.run_folder import RunFolder
from megatron_reheat.stop_request import FINISHING, REQUEUE_EXIT_CODE, StopWatch, hold_stop_signals, stopped_by

if TYPE_CHECKING:
    from megatron_reheat.rollout.fork_server import ForkServer


def train(recipe: Path, overrides: Sequence[str], *, force: bool) -> int:
    """All ranks of a run, or this one where a launcher has started it; returns the exit status.

    Args:
        force: start where the GPUs' memory is estimated not to suffice.

    Raises:
        ReheatError: bad input, or what the run met; in a process that the user started or a rank.
    """
    hold_stop_signals()
    config = load_config(recipe, overrides)
    world_size = _world_size(config)
    if world_size > 1 and "RANK" not in os.environ:
        return _launch(config, world_size, recipe, overrides, force)
    if "RANK" in os.environ:
        become_rank()
    _check_gpu_start(config, world_size, force)
    return _run(config, world_size)


def _launch(config: Config, world_size: int, recipe: Path, overrides: Sequence[str], force: bool) -> int:
    """Ranks on GPUs are interpreters of their own; others share the imports of this one, and their engines each other's."""
    from megatron_reheat.rollout.head_start import has_gpus, start_fork_server

    folder = RunFolder(config.run.path)
    heed_stop_signals(folder, config.run.stop_grace_s)
    let_announce(config.logging.console)
    with start_fork_server(config, world_size) or contextlib.nullcontext() as fork_server:
        _check_gpu_start(config, world_size, force)
        import torch

        run: Sequence[str] | Callable[[], int]
        # torch may see GPUs by other devices (in WSL, say), which a fork of a process that has asked for them cannot use
        if has_gpus() or torch.cuda.is_available():
            run = ["train", str(recipe), *overrides, *(["--force"] if force else [])]
        else:
            # as torchrun has it: libraries start their threads when they are imported, and a fork has none of them
            os.environ.setdefault("OMP_NUM_THREADS", "1")
            _import_training()
            run = partial(reporting_errors, partial(_run, config, world_size, fork_server))
        announce(f"starting {world_size} ranks")
        status = launch_here(world_size, run, folder)
    if callable(run):
        # the interpreter's own end would look through all of torch and Megatron for garbage: seconds, and nothing is left to do
        with contextlib.suppress(OSError):  # nobody reads any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    return status


def _check_gpu_start(config: Config, world_size: int, force: bool) -> None:
    from megatron_reheat.cluster.gpu_start import check_gpu_start
    from megatron_reheat.parallel.kernel_order import order_kernels

    order_kernels(config)
    check_gpu_start(config, world_size, force=force)


def _import_training() -> None:
    announce("importing torch, Megatron-Core and transformers")
    with large_imports():
        import megatron_reheat.stages.run  # noqa: F401


def _world_size(config: Config) -> int:
    """As torchrun says, which must fit the layout, or as the layout asks for."""
    if "RANK" in os.environ:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        config.data_parallel(world_size)
        return world_size
    return config.parallel.block * config.data_parallel()


def _run(config: Config, world_size: int, fork_server: ForkServer | None = None) -> int:
    """In a process of the run: the only one, or a rank."""
    finishing = None
    if os.environ.get("RANK", "0") == "0" and not is_launched():
        patience = ", if torchrun waits so long (its --shutdown-timeout, 30 s by default)"
        finishing = FINISHING + (patience if "TORCHELASTIC_RUN_ID" in os.environ else "")
    # a rank of our launcher leaves the grace time to it
    grace_s = None if is_launched() else config.run.stop_grace_s
    stopped = partial(stopped_by, folder=RunFolder(config.run.path))
    StopWatch(stopped, finishing, grace_s, is_final=is_launchers_own).start()
    let_announce(config.logging.console and os.environ.get("RANK", "0") == "0")
    from megatron_reheat.rollout.head_start import HeadStart

    with HeadStart(config, world_size, fork_server) as head_start:
        if "megatron_reheat.stages.run" not in sys.modules:  # else this rank was forked
            _import_training()
        from megatron_reheat.stages import run

        return 0 if run.train(config, head_start) else REQUEUE_EXIT_CODE
