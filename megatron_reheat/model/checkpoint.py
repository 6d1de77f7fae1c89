"""Checkpoints in Megatron's sharded format: written aside, fsynced, renamed; readable under another TP x PP x DP layout.

    checkpoints/step-120/        Megatron's shards (weights, optimizer), state.json (the stages' state), manifest.json (digests)
    checkpoints/latest           the name of the newest complete one

Training draws no random numbers outside seeds derived from (run seed, step), so no generator state needs to be kept.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
from pathlib import Path
from typing import Any

import torch
import xxhash
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_reheat.errors import ReheatError
from megatron_reheat.model.engine import Engine

_LATEST = "latest"
_STATE = "state.json"
_MANIFEST = "manifest.json"


def save_checkpoint(engine: Engine, folder: Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Writes `folder/step-<step>`, points `latest` at it and removes all but the newest `keep`. A collective.

    A process killed at any moment leaves the previous checkpoint and `latest` intact.
    """
    target, partial = folder / f"step-{step}", folder / f".step-{step}.partial"
    main = engine.topology.is_main
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    engine.topology.barrier()
    dist_checkpointing.save(_sharded_state(engine, is_loading=False), str(partial))
    engine.topology.barrier()
    if main:
        (partial / _STATE).write_text(json.dumps(state, indent=1))
        manifest = {p.name: _digest(p) for p in sorted(partial.iterdir())}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (*partial.iterdir(), partial):
            _fsync(path)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        _point_latest(folder, target.name)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    engine.topology.barrier()
    return target


def load_checkpoint(engine: Engine, checkpoint: Path) -> dict[str, Any]:
    """Restores weights and optimizer, resharding if the layout differs, and returns the stages' state. A collective.

    Raises:
        ReheatError: the checkpoint is incomplete or a file differs from its manifest.
    """
    error = verify_checkpoint(checkpoint) if engine.topology.is_main else None
    if engine.topology.any(error is not None):
        raise ReheatError(error or f"{checkpoint} failed verification on the main rank")
    _ensure_optimizer_state(engine)
    loaded = dist_checkpointing.load(_sharded_state(engine, is_loading=True), str(checkpoint))
    engine.module.load_state_dict(loaded["model"])
    with torch.no_grad():  # Megatron copies float32 parameters in place into leaves that require grad
        engine.optimizer.load_state_dict(loaded["optimizer"])
    _unshare_steps(engine)
    return read_state(checkpoint)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The stages' state of a checkpoint, without its tensors.

    Raises:
        ReheatError: it cannot be read.
    """
    path = checkpoint / _STATE
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise ReheatError(f"{path} is missing or damaged; use an earlier checkpoint") from None


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint under `folder`, or None."""
    pointer = folder / _LATEST
    if pointer.is_file() and (folder / pointer.read_text().strip()).is_dir():
        return folder / pointer.read_text().strip()
    complete = list_checkpoints(folder)
    return complete[-1] if complete else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest step first."""
    return sorted(folder.glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))


def verify_checkpoint(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    manifest_path = checkpoint / _MANIFEST
    if not manifest_path.is_file():
        return f"{checkpoint} has no {_MANIFEST}: it is not a complete checkpoint; use an earlier one"
    for name, digest in json.loads(manifest_path.read_text()).items():
        path = checkpoint / name
        if not path.is_file() or _digest(path) != digest:
            return f"{path} is missing or damaged (its digest differs from {_MANIFEST}); use an earlier checkpoint"
    return None


def _sharded_state(engine: Engine, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "chained_optim_avoid_prefix": True,
    }
    model = engine.module.sharded_state_dict(metadata=metadata)
    optimizer = engine.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    return {"model": model, "optimizer": optimizer}


def _ensure_optimizer_state(engine: Engine) -> None:
    """A fresh process has no moments yet, but Megatron's loader asks every parameter for its shape of them."""
    for optimizer in engine.torch_optimizers():
        if not isinstance(optimizer, torch.optim.AdamW):
            continue  # the fused optimizers are initialised by Megatron itself
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if not optimizer.state[parameter]:
                    optimizer.state[parameter].update(
                        step=torch.zeros((), dtype=torch.float32),
                        exp_avg=torch.zeros_like(parameter.detach()),
                        exp_avg_sq=torch.zeros_like(parameter.detach()),
                    )


def _unshare_steps(engine: Engine) -> None:
    """Megatron hands one `step` tensor to every parameter, which AdamW would then increment once per parameter."""
    for optimizer in engine.torch_optimizers():
        for state in optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()


def install_checkpoint_fixes() -> None:
    """Two corrections to Megatron's checkpoint code; called before the first save or load, and safe to call again."""
    # The results of the writing processes go through a multiprocessing manager, so that an asynchronous save could
    # report from another process. That manager is one more interpreter per rank: it takes seconds to start and outlives
    # a killed rank, holding its terminal or pipe open. Our saves report to the very process that reads the results.
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
    _keep_optimizer_steps()


def _keep_optimizer_steps() -> None:
    """Lets the distributed optimizer load a resharded checkpoint into torch's AdamW.

    Loading skips the per-parameter `step` that `_set_main_param_and_optimizer_states` expects (KeyError), although
    `load_state_dict` has just restored it from the parameter group.
    """
    original = DistributedOptimizer._set_main_param_and_optimizer_states
    if hasattr(original, "keeps_step"):
        return

    @torch.no_grad()
    def with_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        group, index = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][index]]
        if "step" in state:
            tensors = {**tensors, "step": state["step"]}
        return original(self, model_param, tensors)

    with_step.keeps_step = True  # type: ignore[attr-defined]
    DistributedOptimizer._set_main_param_and_optimizer_states = with_step


def _digest(path: Path) -> str:
    hasher = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            hasher.update(block)
    return hasher.hexdigest()


def _point_latest(folder: Path, name: str) -> None:
    temporary = folder / f".{_LATEST}.partial"
    temporary.write_text(name)
    _fsync(temporary)
    os.replace(temporary, folder / _LATEST)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
