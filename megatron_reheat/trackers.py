"""Where a run's metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow and trackio, by their own clients.

A run that goes on continues the tracker's run, by an id that is kept in the run folder.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_reheat.confidential import redact_text
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
    """Where a run is shown beside metrics.jsonl; only the main rank has any."""

    def step(self, record: StepRecord, metrics: Mapping[str, float]) -> None:
        """`metrics` are those of the record that are finite, and perhaps `log/nonfinite`."""
        ...

    def event(self, step: int, text: str) -> None:
        """A sentence about the run at `step`; there may be several."""
        ...

    def close(self, exit_code: int) -> None:
        """Ends the tracker's run, as failed where `exit_code` is not 0."""
        ...


def start_trackers(config: Config, folder: RunFolder, start_step: int) -> list[Tracker]:
    """Those that the configuration asks for.

    Raises:
        ReheatError: one of them cannot be used.
    """
    logging = config.logging
    wanted: tuple[tuple[Any, Callable[[], Tracker]], ...] = (  # first those that are most likely to refuse
        (logging.wandb_project, lambda: WandB(config, folder)),
        (logging.mlflow_experiment, lambda: MLflow(config, folder)),
        (logging.trackio_project, lambda: Trackio(config, folder)),
        (logging.tensorboard, lambda: TensorBoard(folder, start_step)),
    )
    trackers: list[Tracker] = []
    try:
        for is_wanted, start in wanted:
            if is_wanted:
                trackers.append(start())
    except ReheatError:
        for tracker in trackers:
            tracker.close(exit_code=1)
        raise
    return trackers


class TensorBoard:
    """Event files in the run's folder; steps after `start_step` of an earlier process are hidden."""

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


class MLflow:
    """Goes on with the same MLflow run through an id kept in the run folder. A server that does not answer for a while gets
    later what it missed; the run waits for it some seconds a minute, at most."""

    QUIET_S = 60.0  # after a failure nothing is sent for so long
    MAX_METRICS, MAX_TAGS, MAX_PARAMS = 900, 100, 100  # of one call
    MAX_VALUE = 5000  # characters of a tag or parameter

    def __init__(self, config: Config, folder: RunFolder) -> None:
        # by default the client tries for minutes, at every step
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        experiment = config.logging.mlflow_experiment
        try:
            from mlflow import MlflowClient
        except ImportError:
            raise ReheatError(
                f"logging.mlflow_experiment is {experiment!r} but mlflow is not installed; pip install mlflow-skinny (for a "
                "tracking server) or mlflow (with a database of its own), or clear logging.mlflow_experiment"
            ) from None
        self._quiet_until = 0.0
        self._metrics: list[Any] = []
        self._tags: dict[str, str] = {}
        self._stage: str | None = None
        id_file = folder.path / "mlflow_id"
        try:
            self._client: Any = MlflowClient()
            if id_file.exists():
                self._run: str = id_file.read_text().strip()
                self._client.update_run(self._run, status="RUNNING")
            else:
                found = self._client.get_experiment_by_name(experiment)
                place = found.experiment_id if found is not None else self._client.create_experiment(experiment)
                self._run = self._client.create_run(place, run_name=config.run.name).info.run_id
                id_file.write_text(self._run)
            data = self._client.get_run(self._run).data
            self._events = {key: text for key, text in data.tags.items() if key.startswith("event/")}
            self._log_config(public_tree(config), data.params)
        except Exception as error:  # its own kinds, and those of what it talks through
            known = f", which {id_file} names" if id_file.exists() else ""
            raise ReheatError(
                f"MLflow refused to start{known}: {_one_line(error)}; set MLFLOW_TRACKING_URI to a server's address, or to "
                "sqlite:///FILE with the whole mlflow installed, or clear logging.mlflow_experiment"
            ) from None

    def _log_config(self, tree: dict[str, Any], logged: Mapping[str, str]) -> None:
        """As parameters, which are for ever: what a resumed run has changed becomes a tag beside them."""
        from mlflow.entities import Param

        values = dict(_flat(tree, self.MAX_VALUE))
        new = [Param(key, value) for key, value in values.items() if key not in logged]
        for start in range(0, len(new), self.MAX_PARAMS):
            self._client.log_batch(self._run, params=new[start : start + self.MAX_PARAMS])
        self._tags |= {f"changed/{k}": v for k, v in values.items() if k in logged and logged[k] != v}
        self._send()

    def step(self, record: StepRecord, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        values = {"round": record.round, "policy_version": record.policy_version, **metrics}
        self._metrics += [Metric(name, value, now, record.step) for name, value in values.items()]
        if record.stage != self._stage:
            self._stage = self._tags["stage"] = record.stage
        self._send_or_keep()

    def event(self, step: int, text: str) -> None:
        key = f"event/{step:06d}"
        self._events[key] = f"{self._events[key]}\n{text}" if key in self._events else text
        self._tags[key] = self._events[key][-self.MAX_VALUE :]
        self._send_or_keep()

    def close(self, exit_code: int) -> None:
        self._quiet_until = 0.0
        self._send_or_keep()
        try:
            self._client.set_terminated(self._run, "FAILED" if exit_code else "FINISHED")
        except Exception as error:
            self._note(error)

    def _send_or_keep(self) -> None:
        if time.monotonic() < self._quiet_until:
            return
        try:
            self._send()
        except Exception as error:
            self._quiet_until = time.monotonic() + self.QUIET_S
            self._note(error)

    def _send(self) -> None:
        from mlflow.entities import RunTag

        while self._metrics or self._tags:
            metrics, names = self._metrics[: self.MAX_METRICS], list(self._tags)[: self.MAX_TAGS]
            self._client.log_batch(self._run, metrics=metrics, tags=[RunTag(name, self._tags[name]) for name in names])
            del self._metrics[: len(metrics)]
            for name in names:
                del self._tags[name]

    def _note(self, error: Exception) -> None:
        print(
            f"note: MLflow does not take the metrics now ({_one_line(error)}); they are in metrics.jsonl",
            file=sys.stderr,
        )


class Trackio:
    """Goes on with the same trackio run through its name, kept in the run folder."""

    def __init__(self, config: Config, folder: RunFolder) -> None:
        project = config.logging.trackio_project
        try:
            import trackio
        except ImportError:
            raise ReheatError(
                f"logging.trackio_project is {project!r} but trackio is not installed; pip install trackio, or clear "
                "logging.trackio_project"
            ) from None
        self._trackio: Any = trackio
        self._step = 0
        # runs in other folders may be called the same
        name = f"{config.run.name}-{_run_id(folder.path / 'trackio_id')}"
        try:
            self._run: Any = trackio.init(
                project=project, name=name, resume="allow", config=public_tree(config), embed=False
            )
        except Exception as error:  # of its own, of the Hub's client and of a connection
            raise ReheatError(
                f"trackio refused to start: {_one_line(error)}; correct TRACKIO_SPACE_ID or TRACKIO_SERVER_URL, or clear "
                "logging.trackio_project"
            ) from None

    def step(self, record: StepRecord, metrics: Mapping[str, float]) -> None:
        self._step = record.step
        values = {"stage": record.stage, "round": record.round, "policy_version": record.policy_version, **metrics}
        self._run.log(values, step=record.step)

    def event(self, step: int, text: str) -> None:
        self._run.log({"event": text}, step=step)

    def close(self, exit_code: int) -> None:
        if exit_code:  # its runs have no status
            level = self._trackio.AlertLevel.ERROR
            self._run.alert("FAILED", "the run ended with an error", level=level, step=self._step)
        self._trackio.finish()


def _run_id(path: Path) -> str:
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text().strip()


def _flat(tree: Mapping[str, Any], longest: int, above: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every value; keys hold what MLflow takes as one."""
    for key, value in tree.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, longest, f"{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            yield re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:250], text[:longest]


def _one_line(error: Exception) -> str:
    return redact_text(" ".join(str(error).split()))[:300] or type(error).__name__
