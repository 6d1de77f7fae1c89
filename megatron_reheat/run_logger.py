"""What a run says about itself: metrics.jsonl, TensorBoard, Weights & Biases and the terminal.

Only the main rank writes; on the others every call does nothing, so that stages need not ask who they are.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console

from megatron_reheat.config import Config
from megatron_reheat.console import StepConsole
from megatron_reheat.errors import ReheatError, writing
from megatron_reheat.recipe import public_tree
from megatron_reheat.run_folder import Record, RunFolder
from megatron_reheat.types import Group, StageName


@dataclass(frozen=True)
class StepRecord:
    """One step as it is logged. `step` is one count over all stages; metric names have slashes."""

    step: int
    stage: StageName
    round: int
    policy_version: int
    metrics: Mapping[str, float]
    event: str | None = None


class _Sink(Protocol):
    def step(self, record: StepRecord, metrics: Mapping[str, float]) -> None: ...
    def event(self, step: int, text: str) -> None: ...
    def close(self, exit_code: int) -> None: ...


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
        self._sinks: list[_Sink] = []
        self._console: StepConsole | None = None
        if not is_main:
            return
        folder.create(config)
        if config.logging.wandb_project:  # first: of all parts, the one most likely to refuse
            self._sinks.append(_WandB(config, folder))
        if config.logging.tensorboard:
            self._sinks.append(_TensorBoard(folder, start_step))
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
        for sink in self._sinks:
            with writing(self._folder.path):
                sink.step(record, finite)
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
        for sink in self._sinks:
            sink.close(exit_code)
        self._sinks = []
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
        for sink in self._sinks:
            sink.event(step, text)
        if self._console:
            self._console.event(text, style)


class _TensorBoard:
    def __init__(self, folder: RunFolder, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ReheatError(
                "logging.tensorboard is true but tensorboard is not installed; "
                "pip install tensorboard, or set logging.tensorboard=false"
            ) from None
        # Hides what a killed process logged past its checkpoint.
        self._writer: Any = SummaryWriter(str(folder.tensorboard), purge_step=start_step + 1)

    def step(self, record: StepRecord, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, record.step)
        self._writer.flush()

    def event(self, step: int, text: str) -> None:
        self._writer.add_text("events", text, step)

    def close(self, exit_code: int) -> None:
        self._writer.close()


class _WandB:
    """Resumes the same W&B run through an id kept in the run folder. Offline with WANDB_MODE=offline."""

    def __init__(self, config: Config, folder: RunFolder) -> None:
        try:
            import wandb
        except ImportError:
            raise ReheatError(
                f"logging.wandb_project is {config.logging.wandb_project!r} but wandb is not installed; "
                "pip install wandb, or clear logging.wandb_project"
            ) from None
        try:
            self._run: Any = wandb.init(
                project=config.logging.wandb_project,
                name=config.run.name,
                id=_run_id(folder.path / "wandb_id"),
                resume="allow",
                dir=folder.path,
                config=public_tree(config),
            )
        except wandb.Error as error:
            raise ReheatError(
                f"Weights & Biases refused to start: {error}; run `wandb login`, set WANDB_MODE=offline, or clear "
                "logging.wandb_project"
            ) from error
        # W&B's own step counter may not go back, which a resumed run needs.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def step(self, record: StepRecord, metrics: Mapping[str, float]) -> None:
        self._run.log(
            {
                "step": record.step,
                "stage": record.stage,
                "round": record.round,
                "policy_version": record.policy_version,
                **metrics,
            }
        )

    def event(self, step: int, text: str) -> None:
        self._run.log({"step": step, "event": text})

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


def _run_id(path: Path) -> str:
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text().strip()
