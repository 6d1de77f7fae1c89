"""Checkpoints in Megatron's sharded format: written aside, fsynced, renamed; readable under another TP x PP x DP layout.

    checkpoints/step-120/        Megatron's shards (weights, optimizer), state.json (the stages' state), manifest.json (digests)
    checkpoints/latest           the name of the newest complete one
    checkpoints/best             the name of the one with the best evaluation (`checkpoint.keep_best`)

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
from megatron_reheat.parallel.topology import Topology

_LATEST = "latest"
_BEST = "best"
_STATE = "state.json"
_MANIFEST = "manifest.json"


def save_checkpoint(
    engine: Engine, folder: Path, step: int, state: dict[str, Any], *, keep: int, is_best: bool = False
) -> Path:
    """Writes `folder/step-<step>`, points `latest` at it and removes all but the newest `keep` and the best. A collective.

    With `is_best`, `best` points at it too, and it stays until a later one is saved as that. A process killed at any moment
    leaves the previous checkpoint and `latest` intact.
    """
    return _write(engine.topology, folder, step, _sharded_state(engine, is_loading=False), state, keep, is_best)


def save_weights(module: Any, topology: Topology, folder: Path, state: dict[str, Any]) -> Path:
    """Writes `folder/step-0` without an optimizer: a run that loads it starts with fresh moments. A collective."""
    return _write(topology, folder, 0, {"model": module.sharded_state_dict(metadata=_metadata())}, state, keep=1)


def _write(
    topology: Topology,
    folder: Path,
    step: int,
    sharded: dict[str, Any],
    state: dict[str, Any],
    keep: int,
    is_best: bool = False,
) -> Path:
    target, partial = folder / f"step-{step}", folder / f".step-{step}.partial"
    if topology.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    topology.barrier()
    dist_checkpointing.save(sharded, str(partial))
    topology.barrier()
    if topology.is_main:
        (partial / _STATE).write_text(json.dumps(state, indent=1))
        manifest = {p.name: _digest(p) for p in sorted(partial.iterdir())}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (*partial.iterdir(), partial):
            _fsync(path)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        if is_best:
            # first: `latest` must never name a state that knows of a best which `best` does not
            _point(folder, _BEST, target.name)
        _point(folder, _LATEST, target.name)
        remove_old_checkpoints(folder, keep)
    topology.barrier()
    return target


def load_checkpoint(engine: Engine, checkpoint: Path) -> dict[str, Any]:
    """Restores weights and optimizer, resharding if the layout differs, and returns the stages' state. A collective.

    A checkpoint by `save_weights` has no optimizer; its moments then stay as they are, which is zero in a new engine.

    Raises:
        ReheatError: the checkpoint is incomplete or a file differs from its manifest.
    """
    error = verify_checkpoint(checkpoint) if engine.topology.is_main else None
    if engine.topology.any(error is not None):
        raise ReheatError(error or f"{checkpoint} failed verification on the main rank")
    if "optimizer" not in dist_checkpointing.load_common_state_dict(str(checkpoint)):
        load_weights(engine.module, checkpoint)
        engine.optimizer.reload_model_params()
        return read_state(checkpoint)
    _ensure_optimizer_state(engine)
    loaded = dist_checkpointing.load(_sharded_state(engine, is_loading=True), str(checkpoint))
    engine.module.load_state_dict(loaded["model"])
    with torch.no_grad():  # Megatron copies float32 parameters in place into leaves that require grad
        engine.optimizer.load_state_dict(loaded["optimizer"])
    _unshare_steps(engine)
    return read_state(checkpoint)


def load_weights(module: Any, checkpoint: Path) -> None:
    """Fills an unwrapped model from a checkpoint, whose optimizer is not read. A collective."""
    sharded = {"model": module.sharded_state_dict(metadata=_metadata())}
    module.load_state_dict(dist_checkpointing.load(sharded, str(checkpoint))["model"])


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
    if (named := _named_by(folder, _LATEST)) is not None:
        return named
    complete = list_checkpoints(folder)
    return complete[-1] if complete else None


def best_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint under `folder` with the best evaluation, or None when none was kept as that."""
    return _named_by(folder, _BEST)


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints and the best one."""
    best = best_checkpoint(folder)
    for old in list_checkpoints(folder)[:-keep]:
        if old != best:
            shutil.rmtree(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest step first."""
    return sorted(folder.glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))


def verify_checkpoint(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    manifest_path = checkpoint / _MANIFEST
    if not manifest_path.is_file():
        return f"{checkpoint} has no {_MANIFEST}: it is not a complete checkpoint; use an earlier one"
    try:
        manifest = dict(json.loads(manifest_path.read_text()))
    except (ValueError, TypeError):
        return f"{manifest_path} is damaged; use an earlier checkpoint"
    for name, digest in manifest.items():
        path = checkpoint / name
        if not path.is_file() or _digest(path) != digest:
            return f"{path} is missing or damaged (its digest differs from {_MANIFEST}); use an earlier checkpoint"
    return None


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "chained_optim_avoid_prefix": True,
    }


def _sharded_state(engine: Engine, *, is_loading: bool) -> dict[str, Any]:
    metadata = _metadata()
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


def _named_by(folder: Path, pointer: str) -> Path | None:
    path = folder / pointer
    named = folder / path.read_text().strip() if path.is_file() else folder
    return named if named != folder and named.is_dir() else None


def _point(folder: Path, pointer: str, name: str) -> None:
    temporary = folder / f".{pointer}.partial"
    temporary.write_text(name)
    _fsync(temporary)
    os.replace(temporary, folder / pointer)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
