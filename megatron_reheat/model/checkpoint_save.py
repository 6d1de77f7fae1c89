"""How a checkpoint is written: aside, fsynced, renamed; while training goes on, or waited for.

    begin   every rank copies what it writes into host memory, and training may go on
    write   in a thread: the optimizer's parts go to the first replicas, each rank writes its files, fsyncs and hashes them
    finish  at the next border of two steps at which all ranks have written: list of tensors, digests, the folder's name

Only `finish` makes a checkpoint of it: until the rename nothing in `checkpoints/` but a hidden folder has changed.
"""

from __future__ import annotations

import inspect
import json
import os
import queue
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_reheat.checkpoint_folder import BEST, LATEST, fsync, point, remove_old_checkpoints, set_aside
from megatron_reheat.errors import ReheatError, cannot_write, writing
from megatron_reheat.model.checkpoint import (
    HASHING_THREADS,
    MANIFEST,
    STATE,
    digest,
    sharded_snapshot,
    sharded_state,
    sharded_weights,
)
from megatron_reheat.model.checkpoint_pickles import explain
from megatron_reheat.model.engine import Engine
from megatron_reheat.model.host_copy import HostBuffers, HostCopy
from megatron_reheat.model.master_weights import Snapshot
from megatron_reheat.parallel.topology import Topology, new_peer_group

NO_SNAPSHOTS: Mapping[str, Snapshot] = {}
# what torch's writer says of a file that it could not write
_OF_A_FILE = re.compile("inline_container|PytorchStreamWriter|iostream error")


@dataclass(frozen=True)
class Contents:
    """Of a checkpoint, besides the tensors.

    `state` is the stages'; the main rank's `carried` (`read_carried_files`) lie in it, too. With `is_best`, `best` points at
    it, and it stays until a later one is saved as that. All but the newest `keep`, it and the best go when it is complete.
    """

    step: int
    state: Mapping[str, Any]
    keep: int
    is_best: bool = False
    carried: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete now, and the seconds from its copy until the slowest rank had written it."""

    path: Path
    write_s: float


def save_checkpoint(
    engine: Engine,
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    *,
    keep: int,
    is_best: bool = False,
    snapshots: Mapping[str, Snapshot] = NO_SNAPSHOTS,
    carried: Mapping[str, bytes] | None = None,
) -> Path:
    """Writes `folder/step-<step>`, points `latest` at it and removes all but the newest `keep`, it and the best. A collective.

    `snapshots` are kept for `load_snapshot`; the rest is `Contents`. A process killed at any moment leaves the previous
    checkpoint and `latest` intact.
    """
    saver = CheckpointSaver(engine, folder, in_background=False)
    saver.begin(Contents(step, state, keep, is_best, carried or {}), snapshots)
    saved = saver.finish(wait=True)
    assert saved is not None
    return saved.path


def save_weights(
    module: Any, topology: Topology, folder: Path, state: Mapping[str, Any], carried: Mapping[str, bytes]
) -> Path:
    """Writes `folder/step-0` without an optimizer: a run that loads it starts with fresh moments. A collective."""
    copy = HostCopy(HostBuffers(topology.device))
    sharded = {"model": sharded_weights(module)}
    copy.copy(sharded, is_fresh=topology.device.type == "cpu")
    save = _Save(topology, folder, Contents(0, state, keep=1, carried=carried), copy, sharded)
    return save.finish(save.write(None)).path


class CheckpointSaver:
    """Saves an engine's checkpoints into a folder, one at a time. Every method but `step` is a collective.

    With `in_background` each is written by a thread, for which there is a process group; without, `finish` does it. Whoever has
    begun one and goes on training calls `finish` at every border of two steps.
    """

    def __init__(self, engine: Engine, folder: Path, *, in_background: bool) -> None:
        self._engine, self._folder, self.in_background = engine, folder, in_background
        self._buffers = HostBuffers(engine.topology.device)
        self._group: dist.ProcessGroup | None = None
        self._thread: ThreadPoolExecutor | None = None
        if in_background:
            self._group = new_peer_group(engine.topology, engine.config.parallel.timeout_s)
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._known: set[frozenset[str]] = set()  # the snapshots beside what was saved already
        self._save: _Save | None = None
        self._written: Future[_Written] | None = None

    @property
    def step(self) -> int | None:
        """Of the save that is begun and not finished; the same on every rank."""
        return None if self._save is None else self._save.contents.step

    def begin(self, contents: Contents, snapshots: Mapping[str, Snapshot] = NO_SNAPSHOTS) -> None:
        """Returns when everything is copied: weights and optimizer may change from here on. `snapshots` are other weights of
        the model, which `load_snapshot` finds by their names.

        Raises:
            ReheatError: the folder cannot be written.
        """
        assert self._save is None
        engine, copy, names = self._engine, HostCopy(self._buffers), frozenset(snapshots)
        with self._buffers.copying():
            with copy.planning():
                sharded = sharded_state(engine, is_loading=False)
            copy.copy(sharded)
        for name, snapshot in snapshots.items():
            parts = copy.copy_parts(engine.masters.parts(snapshot), is_first=engine.topology.replica_rank == 0)
            sharded[name] = sharded_snapshot(engine, name, parts)
        save = _Save(engine.topology, self._folder, contents, copy, sharded, names in self._known)
        self._known.add(names)
        if self._thread is not None:
            self._written = self._thread.submit(save.write, self._group)
        self._save = save

    def finish(self, *, wait: bool) -> Saved | None:
        """Completes the save that was begun, if all ranks have written it; with `wait` it is waited for. None if there is none
        to complete.

        Raises:
            ReheatError: a rank could not write; the others are waited for, and what was saved before is as it was.
        """
        if self._save is None:
            return None
        topology, written = self._engine.topology, self._written
        if not wait:
            assert written is not None
            done = written.done()
            has_failed = done and (written.exception() is not None or written.result().error is not None)
            if topology.any(not done) and not topology.any(has_failed):
                return None
        save, self._save, self._written = self._save, None, None
        try:
            return save.finish(save.write(None) if written is None else written.result())
        finally:
            if self._thread is None:
                self._buffers = HostBuffers(topology.device)


@dataclass(frozen=True)
class _Written:
    """What a rank has written: {name: digest}, the operating system's refusal, the seconds since the copy."""

    digests: dict[str, str]
    error: str | None
    seconds: float


class _Save:
    """One save. Each step is on disk before the next one begins: a loss of power leaves a whole checkpoint and names it.

    1. Every file is synced, then the folder that names them.
    2. The folder gets its name; that is on disk with the first pointer's, which syncs `folder`.
    3. `point` syncs a pointer's file, replaces the old one by it and syncs `folder`.
    4. Old checkpoints go, each under a name that is no checkpoint's first; whatever is left of one the next save clears.
    """

    def __init__(
        self,
        topology: Topology,
        folder: Path,
        contents: Contents,
        copy: HostCopy,
        sharded: dict[str, Any],
        is_known: bool = False,
    ) -> None:
        """Megatron's plan, with its collectives; nothing of the values is read. Every rank makes it together. With `is_known`
        the ranks do not tell each other which parts they write: the last save of the same parts found each written once."""
        self.contents = contents
        self._topology, self._copy, self._began = topology, copy, time.perf_counter()
        self._outcomes: list[Any] = []  # of this rank's files, for Megatron's list of tensors
        self._target = folder / f"step-{contents.step}"
        self._partial = folder / f".step-{contents.step}.partial"
        with self._refusing(), writing(self._target):
            if topology.is_main:
                for left in folder.glob(".step-*.partial"):  # by a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
                self._partial.mkdir(parents=True)
            topology.barrier()
            with self._explaining():
                self._request = dist_checkpointing.save(
                    sharded,
                    str(self._partial),
                    validate_access_integrity=not is_known,
                    async_sharded_save=True,
                    **_own_strategy(),
                )

    def write(self, group: dist.ProcessGroup | None) -> _Written:
        """This rank's files, on disk, in threads: a forked process that is killed would be waited for without end, and one that
        outlives a killed trainer would hold its pipes and its memory. A collective of the replicas (`HostCopy.gather`)."""
        self._copy.gather(group)
        if self._request.async_fn is None:  # nothing to write
            return _Written({}, None, time.perf_counter() - self._began)
        _, buckets, _ = self._request.async_fn_args
        transforms, *_ = self._request.async_fn.args
        with ThreadPoolExecutor(max(len(buckets), 1), thread_name_prefix="checkpoint-file") as threads:
            jobs = [threads.submit(self._write_file, transforms, index, bucket) for index, bucket in enumerate(buckets)]
        self._copy.forget()
        files = [job.result() for job in jobs]
        errors = [outcome for outcome, _ in files if isinstance(outcome, BaseException)]
        self._outcomes = [outcome for outcome, _ in files]
        digests = {name: known for (_, name, _), (_, known) in zip(buckets, files, strict=True) if known}
        return _Written(digests, _reason(errors[0]) if errors else None, time.perf_counter() - self._began)

    def finish(self, written: _Written) -> Saved:
        """A collective."""
        topology, folder = self._topology, self._target.parent
        with self._refusing(), writing(self._target):
            error = None if written.error is None else str(cannot_write(folder, written.error))
            ranks = topology.share_from_all(written, error)
            if self._outcomes:
                _, _, results = self._request.async_fn_args
                results.put(dict(enumerate(self._outcomes)))
            with self._explaining():
                for finalize in self._request.finalize_fns:
                    finalize()
            if topology.is_main:
                self._complete({name: known for rank in ranks for name, known in rank.digests.items()})
                if self._target.exists():
                    set_aside(self._target)
                self._partial.rename(self._target)
                if self.contents.is_best:
                    # first: `latest` must never name a state that knows of a best which `best` does not
                    point(folder, BEST, self._target.name)
                point(folder, LATEST, self._target.name)
                remove_old_checkpoints(folder, self.contents.keep)
        topology.barrier()
        return Saved(self._target, max(rank.seconds for rank in ranks))

    def _write_file(self, transforms: list[Any], index: int, bucket: Sequence[Any]) -> tuple[Any, str | None]:
        """What Megatron's writer gives back for a file, which may be what went wrong, and the file's digest."""
        path, name, (objects, places) = bucket
        results: queue.Queue[Any] = queue.Queue()
        count: queue.Queue[Any] = queue.Queue()  # by which forks would tell that they are done
        count.put(index)
        # not as Megatron has it, without the garbage collector, which the training around it needs
        write = inspect.unwrap(filesystem_async.FileSystemWriterAsync.write_preloaded_data)
        write(transforms, index, (path, name, (objects, _Values(self._copy, places))), results, count, use_fsync=True)
        _, outcome = results.get_nowait()
        if isinstance(outcome, OSError) or (isinstance(outcome, RuntimeError) and _OF_A_FILE.search(str(outcome))):
            return outcome, None
        if isinstance(outcome, BaseException):
            raise outcome
        try:
            return outcome, digest(Path(path))
        except OSError as error:
            return error, None

    def _complete(self, digests: dict[str, str]) -> None:
        """The folder's last files; everything in it is on disk then."""
        partial = self._partial
        (partial / STATE).write_text(json.dumps(self.contents.state, indent=1))
        for name, content in self.contents.carried.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        others = [path for path in files if path.relative_to(partial).as_posix() not in digests]
        with ThreadPoolExecutor(HASHING_THREADS) as threads:
            found = zip(others, threads.map(digest, others), strict=True)
            manifest = digests | {path.relative_to(partial).as_posix(): known for path, known in found}
        (partial / MANIFEST).write_text(json.dumps(dict(sorted(manifest.items())), indent=1))
        for path in (*partial.rglob("*"), partial):
            fsync(path)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Whatever is left of a save that could not be written goes."""
        try:
            yield
        except ReheatError:  # on whichever rank: the others may wait for this one, and end with it
            shutil.rmtree(self._partial, ignore_errors=True)
            raise

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Inside, a file that torch could not write is one sentence."""
        try:
            yield
        except RuntimeError as error:
            if not _OF_A_FILE.search(str(error)):
                raise
            raise cannot_write(self._target.parent, _reason(error)) from None


class _Values:
    """What a file's places stand for, one after the other, as the writer asks for them."""

    def __init__(self, copy: HostCopy, places: Sequence[tuple[Any, Any]]) -> None:
        self._copy, self._places = copy, places

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return ((item, self._copy.values(place)) for item, place in self._places)


def _own_strategy() -> dict[str, str]:
    """From 0.19 on Megatron would take another package's writer by default."""
    has_choice = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if has_choice else {}


def _reason(error: BaseException) -> str:
    """What the operating system said, out of what torch's writer makes of it."""
    if found := re.search(r"\[Errno (\d+)\]", str(error)):
        return os.strerror(int(found[1]))
    if _OF_A_FILE.search(str(error)):
        return f"a file could not be written in full, the disk may be full ({explain(error)})"
    return explain(error)
