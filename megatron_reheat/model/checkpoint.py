"""Checkpoints in Megatron's sharded format, and how they are read, under another TP x PP x CP x DP layout, too.

    checkpoints/step-120/        Megatron's shards (weights, optimizer; while reheating the last good weights, too), state.json
                                 (the stages' state), config.yaml and hf/ (`carried_files`: with them the folder can be
                                 converted wherever it is copied), manifest.json (digests of all of these)
    checkpoints/latest           the name of the newest complete one
    checkpoints/best             the name of the one with the best evaluation (`checkpoint.keep_best`)

`checkpoint_save` writes them.
Training draws no random numbers outside seeds derived from (run seed, step), so no generator state needs to be kept.
"""

from __future__ import annotations

import json
import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint import CheckpointException

from megatron_reheat.checkpoint_folder import LATEST
from megatron_reheat.checkpoint_folder import best_checkpoint as best_checkpoint
from megatron_reheat.checkpoint_folder import latest_checkpoint as latest_checkpoint
from megatron_reheat.checkpoint_folder import list_checkpoints as list_checkpoints
from megatron_reheat.errors import ReheatError
from megatron_reheat.model.carried_files import MODEL_FOLDER, is_carried
from megatron_reheat.model.checkpoint_pickles import METADATA, explain, find_unsafe_pickle, no_code, read_metadata
from megatron_reheat.model.chunks import ModelChunks
from megatron_reheat.model.engine import Engine
from megatron_reheat.model.host_copy import names_of_values
from megatron_reheat.model.master_weights import Snapshot

STATE = "state.json"
MANIFEST = "manifest.json"
HASHING_THREADS = 8  # a checkpoint of tens of GB is read back as fast as its disk gives it
_DIFFERS = f"{{}} is missing or damaged (its digest differs from {MANIFEST})"


def load_checkpoint(engine: Engine, checkpoint: Path) -> dict[str, Any]:
    """Restores weights and optimizer, resharding if the layout differs, and returns the stages' state. A collective.

    A checkpoint by `save_weights` has no optimizer; its moments then stay as they are, which is zero in a new engine.

    Raises:
        ReheatError: the checkpoint is incomplete or a file differs from its manifest.
    """
    error = verify_checkpoint(checkpoint) if engine.topology.is_main else None
    if engine.topology.any(error is not None):
        raise ReheatError(error or f"{checkpoint} failed verification on the main rank")
    with _reading(checkpoint):
        has_optimizer = "optimizer" in dist_checkpointing.load_common_state_dict(str(checkpoint))
        if not has_optimizer and any(n.startswith("optimizer.") for n in read_metadata(checkpoint).state_dict_metadata):
            raise ValueError("common.pt lacks the optimizer, whose moments are there")
    if not has_optimizer:
        load_weights(engine.module, checkpoint)
        engine.optimizer.reload_model_params()
        return read_state(checkpoint)
    loaded = _load(sharded_state(engine, is_loading=True), checkpoint, by_parts=True)
    engine.module.load_state_dict(loaded["model"])
    with torch.no_grad():  # Megatron copies float32 parameters in place into leaves that require grad
        engine.optimizer.load_state_dict(loaded["optimizer"])
    _unshare_steps(engine)
    return read_state(checkpoint)


def load_snapshot(engine: Engine, checkpoint: Path, name: str) -> Snapshot | None:
    """Weights that were saved beside the policy's under this name, under this engine's layout; None if there were none. A
    collective."""
    with _reading(checkpoint):
        names = read_metadata(checkpoint).state_dict_metadata
    if not any(known.startswith(f"{_key(name)}.") for known in names):
        return None
    own = {of: torch.empty(p.shape) for of, p in engine.module.named_parameters() if of in engine.masters.names}
    sharded = {name: sharded_snapshot(engine, name, own)}
    return engine.masters.part(_load(sharded, checkpoint, by_parts=True).get(name, {}))


def load_weights(module: ModelChunks, checkpoint: Path) -> None:
    """Fills an unwrapped model from a checkpoint, whose optimizer is not read. A collective."""
    sharded = {"model": sharded_weights(module)}
    module.load_state_dict(_load(sharded, checkpoint)["model"])


def _load(sharded: dict[str, Any], checkpoint: Path, *, by_parts: bool = False) -> dict[str, Any]:
    """`by_parts`: ranks ask for what they need, so that some of it is asked for by others than the rank that wrote it."""
    with _reading(checkpoint):
        return dist_checkpointing.load(sharded, str(checkpoint), validate_access_integrity=not by_parts)


@contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    """Inside, no code of the checkpoint is run, and files that are not what torch and Megatron write are one sentence."""
    try:
        with no_code():
            yield
    except CheckpointException as error:  # torch gathers what went wrong on each rank
        reasons = [reason for reason, _ in error.failures.values()]
        reason = explain(reasons[0]) if reasons else "another rank could not read it"
        failure = ReheatError(f"{checkpoint} cannot be read: {reason}; {use_instead(checkpoint)}")
        failure.on_every_rank = True
        raise failure from None
    except RuntimeError:
        raise  # not the files': another rank is gone, say, or memory is short
    except Exception as error:
        reason = f"{type(error).__name__}: {explain(error)}"
        raise ReheatError(f"{checkpoint} cannot be read: {reason}; {use_instead(checkpoint)}") from None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The stages' state of a checkpoint, without its tensors, whose files may be damaged still.

    Raises:
        ReheatError: it cannot be read, or is not what was saved.
    """
    path = checkpoint / STATE
    state, manifest = _read_json(path), _read_json(checkpoint / MANIFEST)
    problem = None if isinstance(state, dict) else f"{path} is missing or damaged"
    if isinstance(manifest, dict) and STATE in manifest and not _is_whole(path, manifest[STATE]):
        problem = _DIFFERS.format(path)
    if problem is not None:
        raise ReheatError(f"{problem}; {use_instead(checkpoint)}")
    return state


def _read_json(path: Path) -> Any:
    """None where there is no such file, or it cannot be read as JSON."""
    try:
        return json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None


def _is_whole(path: Path, known: Any) -> bool:
    """Only of files: a pipe would be waited for, a device read without end."""
    try:
        return path.is_file() and digest(path) == known
    except OSError:
        return False


def verify_checkpoint(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint and what to use instead, or None."""
    problem = _find_damage(checkpoint)
    return None if problem is None else f"{problem}; {use_instead(checkpoint)}"


def carried_model(checkpoint: Path) -> Path | None:
    """The folder of the model's configuration and tokenizer inside a checkpoint; None in one by an earlier version.

    Raises:
        ReheatError: the checkpoint is incomplete, or one of the files that it carries is damaged. Its tensors may be, still.
    """
    if problem := _find_damage(checkpoint, is_carried):
        raise ReheatError(f"{problem}; {use_instead(checkpoint)}")
    folder = checkpoint / MODEL_FOLDER
    return folder if (folder / "config.json").is_file() else None


def _find_damage(checkpoint: Path, is_asked: Callable[[str], bool] | None = None) -> str | None:
    """With `is_asked`, only in the files of such names."""
    manifest_path = checkpoint / MANIFEST
    if not os.path.lexists(manifest_path):
        return f"{checkpoint} has no {MANIFEST}: it is not a complete checkpoint"
    manifest = _read_json(manifest_path)
    if not isinstance(manifest, dict) or not {STATE, METADATA} <= manifest.keys():
        return f"{manifest_path} is damaged"
    asked = {n: checkpoint / n for n in manifest if is_asked is None or is_asked(n)}
    for name, path in asked.items():
        if path.parent not in (checkpoint, checkpoint / MODEL_FOLDER):
            return f"{manifest_path} is damaged: it names {name}, outside the checkpoint"
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        whole = threads.map(_is_whole, asked.values(), (manifest[name] for name in asked))
        for path, is_whole in zip(asked.values(), whole, strict=True):
            if not is_whole:
                return _DIFFERS.format(path)
    return find_unsafe_pickle(checkpoint) if is_asked is None else None


def use_instead(checkpoint: Path) -> str:
    """The way out for who wanted to go on from a damaged checkpoint."""
    folder = checkpoint.absolute().parent
    for other in reversed(list_checkpoints(folder)):
        if other.name != checkpoint.absolute().name and _find_damage(other) is None:
            return (
                f"the newest whole checkpoint is {other}: to use it, write {other.name} into {folder / LATEST} (or give its "
                "path to reheat convert)"
            )
    instead = "move that folder away to start the run anew"
    if folder.name != "checkpoints":  # it was copied
        instead = "copy the checkpoint again from where its run saved it"
    return f"no earlier checkpoint in {folder} is whole: {instead}"


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        # gathered in host memory, on the first replica; otherwise on every GPU, and in every rank's host memory
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "chained_optim_avoid_prefix": True,
    }


def sharded_weights(module: Any) -> dict[str, Any]:
    """The model's parameters by name, as Megatron shards them."""
    sharded: dict[str, Any] = module.sharded_state_dict(metadata=_metadata())
    return sharded


def sharded_state(engine: Engine, *, is_loading: bool) -> dict[str, Any]:
    """Model and optimizer, as Megatron shards them. A collective."""
    _ensure_optimizer_state(engine)
    model = sharded_weights(engine.module)
    optimizer = engine.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_metadata())
    if optimizer.get("param_state", model) is None:  # all of it is with the first replica
        del optimizer["param_state"]
    return {"model": model, "optimizer": optimizer}


def sharded_snapshot(engine: Engine, snapshot: str, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Other float32 values of some of the model's parameters, sharded as these are; both by parameter name. `snapshot` is what
    the checkpoint calls them."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    sharded: dict[str, Any] = {}
    for entry in nested_values(sharded_weights(engine.module)):
        name = names.get(id(entry.data)) if isinstance(entry, ShardedTensor | ShardedTensorFactory) else None
        if name in weights:
            changes: dict[str, Any] = {"key": f"{_key(snapshot)}.{entry.key}", "data": weights[name]}
            if isinstance(entry, ShardedTensor):
                changes["dtype"] = torch.float32
            sharded[name] = replace(entry, **changes)
    assert len(sharded) == len(weights)
    return sharded


def _key(snapshot: str) -> str:
    return f"optimizer.{snapshot}"


def _ensure_optimizer_state(engine: Engine) -> None:
    """Before the first update there are no moments yet, of which Megatron asks every parameter for its part, when it saves and
    when it loads: a run may have to save after a step in which there was nothing to train on. Megatron itself makes those of
    fused optimizers, which count steps by group, only when it loads."""
    for optimizer in engine.torch_optimizers():
        counts_by_parameter = isinstance(optimizer, torch.optim.AdamW)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if not optimizer.state[parameter]:
                    moments = {name: torch.zeros_like(parameter.detach()) for name in ("exp_avg", "exp_avg_sq")}
                    steps = {"step": torch.zeros((), dtype=torch.float32)} if counts_by_parameter else {}
                    optimizer.state[parameter].update(steps | moments)


def _unshare_steps(engine: Engine) -> None:
    """Megatron hands one `step` tensor to every parameter, which AdamW would then increment once per parameter."""
    for optimizer in engine.torch_optimizers():
        for state in optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()


def install_checkpoint_fixes() -> None:
    """Three corrections to Megatron's checkpoint code; called before the first save or load, and safe to call again."""
    # The results of the writing processes go through a multiprocessing manager, so that a save could report from another
    # process. That manager is one more interpreter per rank: it takes seconds to start and outlives
    # a killed rank, holding its terminal or pipe open. Our saves report to the very process that reads the results.
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
    _keep_optimizer_steps()
    _load_own_parts()


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


def _load_own_parts() -> None:
    """Has the distributed optimizer ask a checkpoint for the parameters of which this rank holds a part, and make no others.

    Megatron makes the state of all parameters on every rank, and reads all of it, to keep a replica's share: 12 bytes a
    parameter of the model in the host memory of each rank. It also makes it without the padding between buckets, but cuts it
    into parameters at the places they have with it (with pipeline stages, a tied embedding has a bucket of its own).
    """
    if hasattr(DistributedOptimizer, "loads_own_parts"):
        return
    gather, shard = (
        DistributedOptimizer.get_parameter_state_dp_zero,
        DistributedOptimizer.sharded_param_state_fully_reshardable,
    )

    def get_parameter_state_dp_zero(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("empty_data"):
            return gather(self, *args, **kwargs)
        places = {
            index: {dtype: _places(self, buffer) for dtype in ranges}
            for index, (buffer, ranges) in enumerate(zip(self.buffers, self.gbuf_ranges, strict=True))
        }
        return {"buckets_coalesced": True, **places}

    def sharded_param_state_fully_reshardable(
        self: Any, model: Any, is_loading: bool = False, metadata: Any = None
    ) -> Any:
        state = shard(self, model, is_loading, metadata)
        if not is_loading:
            return state
        order = [parameter for buffer in self.buffers for parameter in buffer.param_index_map]
        own = {index: state[index] for index, p in enumerate(order) if p in self.model_param_gbuf_map}
        for entry in (entry for of_one in own.values() for entry in of_one.values()):
            entry.data = torch.empty(entry.data.shape, dtype=entry.data.dtype)
        return own

    DistributedOptimizer.get_parameter_state_dp_zero = get_parameter_state_dp_zero
    DistributedOptimizer.sharded_param_state_fully_reshardable = sharded_param_state_fully_reshardable
    DistributedOptimizer.loads_own_parts = True


def _places(optimizer: DistributedOptimizer, buffer: Any) -> dict[str, Any]:
    """What stands for a buffer's state until it is known what of it is needed: nothing is allocated."""
    places = {name: torch.empty(buffer.numel, device="meta") for name in names_of_values(optimizer)}
    return {**places, "numel_unpadded": buffer.numel_unpadded}


def digest(path: Path) -> str:
    """Of a file's content, as the manifest has it."""
    hasher = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            hasher.update(block)
    return hasher.hexdigest()
