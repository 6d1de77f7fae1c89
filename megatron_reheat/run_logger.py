"""What a run says about itself: metrics.jsonl, the trackers (`trackers`) and the terminal.

Only the main rank writes; on the others every call does nothing, so that stages need not ask who they are.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console

from megatron_reheat.config import Config
from megatron_reheat.console import StepConsole
from megatron_reheat.errors import writing
from megatron_reheat.run_folder import Record, RunFolder
from megatron_reheat.trackers import StepRecord, Tracker, start_trackers
from megatron_reheat.types import Group


class RunLogger:
    """Writes one run's log; a context manager, so that trackers learn of a crash.

    `start_step` is the last step that the loaded checkpoint holds, 0 for a fresh run. Lines of later steps, left by a
    process that was killed after its checkpoint, move to `metrics.discarded.jsonl`: steps stay unique, nothing is lost.

    Raises:
        ReheatError: the folder cannot be written, or a tracker that the configuration asks for cannot be used.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        *,
        is_main: bool,
        start_step: int,
        total_steps: int | None = None,
        console: Console | None = None,
    ) -> None:
        self._folder = folder
        self._is_main = is_main
        self._step = start_step
        self._trackers: list[Tracker] = []
        self._console: StepConsole | None = None
        if not is_main:
            return
        folder.create(config)
        self._trackers = start_trackers(config, folder, start_step)
        with writing(folder.metrics):
            discarded = folder.discard_after(start_step)
        is_new = not folder.metrics.exists() or not folder.metrics.stat().st_size
        # unbuffered: a line that did not get to the disk must not be tried again, on the way out
        self._file = folder.metrics.open("ab", buffering=0)
        if config.logging.console:
            total = config.sft.steps + config.run.steps if total_steps is None else total_steps
            self._console = StepConsole(
                total, {name: config.eval.samples_of(name) for name in config.eval.sets}, console
            )
        if is_new and config.run.fork_from:
            text = f"forked from {config.run.fork_from} at step {start_step}"
            self._write({"step": start_step, "event": text, "fork_step": start_step})
            self._announce(start_step, text, "bold")
        elif discarded:
            self.log_event(f"resumed after step {start_step}; {discarded} later lines set aside", "bold")

    def log_step(self, record: StepRecord) -> None:
        """Values that are NaN or infinite are written as null and counted in `log/nonfinite`.

        Raises:
            ValueError: a metric name has no slash, so that it could hide one of the record's own keys.
        """
        if not self._is_main:
            return
        for name in record.metrics:
            if "/" not in name:
                raise ValueError(f"metric {name!r} needs a group, e.g. 'policy/{name}'")
        self._step = record.step
        values = {name: float(value) for name, value in record.metrics.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        broken = [name for name in values if name not in finite]
        if broken:
            finite["log/nonfinite"] = float(len(broken))
        line: Record = {
            "step": record.step,
            "stage": record.stage,
            "round": record.round,
            "policy_version": record.policy_version,
            **dict.fromkeys(values),
            **finite,
            "time/unix_s": round(time.time(), 3),  # when, for whoever lays other logs beside this one
        }
        if record.event is not None:
            line["event"] = record.event
        self._write(line)
        for tracker in self._trackers:
            with writing(self._folder.path):
                tracker.step(record, finite)
        if self._console:
            self._console.step(record.step, record.stage, finite)
            if broken:
                self._console.event(f"not finite at step {record.step}: {', '.join(broken)}", "bold red")
        if record.event is not None:
            self._announce(record.step, record.event, "bold yellow")

    def log_event(self, text: str, style: str = "bold yellow") -> None:
        """Announces a transition on a line of its own, under the step that was logged last."""
        if not self._is_main:
            return
        self._write({"step": self._step, "event": text})
        self._announce(self._step, text, style)

    def write_rollouts(
        self, step: int, groups: Sequence[Group], decode: Callable[[Sequence[int]], str], limit: int
    ) -> None:
        """Writes the first `limit` groups to `rollouts/`, one completion a line."""
        if self._is_main:
            self._folder.write_rollouts(step, groups, decode, limit)

    def close(self, exit_code: int = 0) -> None:
        """Closes files and trackers; calling it again does nothing."""
        for tracker in self._trackers:
            tracker.close(exit_code)
        self._trackers = []
        if self._is_main:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(exit_code=0 if kind is None else 1)

    def sync(self) -> None:
        """Before a checkpoint: whoever goes on from it after a power failure finds the lines of the steps before."""
        if self._is_main:
            with writing(self._folder.metrics):
                os.fsync(self._file.fileno())

    def _write(self, line: Record) -> None:
        data = (json.dumps(line, allow_nan=False) + "\n").encode()
        with writing(self._folder.metrics):
            size = os.fstat(self._file.fileno()).st_size
            try:
                if self._file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                os.ftruncate(self._file.fileno(), size)  # no half a line
                raise

    def _announce(self, step: int, text: str, style: str) -> None:
        for tracker in self._trackers:
            tracker.event(step, text)
        if self._console:
            self._console.event(text, style)
