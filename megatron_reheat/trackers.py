"""Where a run's metrics go besides metrics.jsonl: TensorBoard and Weights & Biases, through their own clients."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_reheat.config import Config
from megatron_reheat.errors import ReheatError
from megatron_reheat.recipe import public_tree
from megatron_reheat.run_folder import RunFolder
from megatron_reheat.types import StageName


@dataclass(frozen=True)
class StepRecord:
    """One step as it is logged. `step` is one count over all stages; metric names have slashes."""

    step: int
    stage: StageName
    round: int
    policy_version: int
    metrics: Mapping[str, float]
    event: str | None = None


class Tracker(Protocol):
    def step(self, record: StepRecord, metrics: Mapping[str, float]) -> None: ...
    def event(self, step: int, text: str) -> None: ...
    def close(self, exit_code: int) -> None: ...


def start_trackers(config: Config, folder: RunFolder, start_step: int) -> list[Tracker]:
    """Those that the configuration asks for.

    Raises:
        ReheatError: one of them cannot be used.
    """
    trackers: list[Tracker] = []
    if config.logging.wandb_project:  # first: of all parts, the one most likely to refuse
        trackers.append(WandB(config, folder))
    if config.logging.tensorboard:
        trackers.append(TensorBoard(folder, start_step))
    return trackers


class TensorBoard:
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


class WandB:
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
