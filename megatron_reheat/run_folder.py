"""The run folder: where everything a run writes lies, and how its metrics are read back.

config.yaml              resolved configuration
run.lock                 who writes here now (`run_lock`)
metrics.jsonl            one object a step: step, stage, round, policy_version, then metrics with slashes
metrics.discarded.jsonl  lines that a killed process wrote after its last checkpoint
rollouts/step-000123.jsonl
checkpoints/             step-N/, each complete by itself (`model.checkpoint`), and which is latest and best
wandb_id, mlflow_id, trackio_id
                         the trackers' runs, which a run that goes on continues
borders/                 round-N-before/, round-N-after/: the policy as Hugging Face folders, with `checkpoint.borders`
reference/  tensorboard/  report/  logs/
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_reheat.checkpoint_folder import checkpoint_step, latest_checkpoint
from megatron_reheat.confidential import redact
from megatron_reheat.config import Config
from megatron_reheat.errors import ConfigError, ReheatError, writing
from megatron_reheat.recipe import dump_config
from megatron_reheat.types import Group

Record = dict[str, Any]
Side = Literal["before", "after"]
SIDES: tuple[Side, ...] = ("before", "after")


@dataclass(frozen=True)
class RunFolder:
    """Where what a run writes lies. Nothing need exist: asking for a path makes none."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration of the latest start, without secrets."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, for each step and each event."""
        return self.path / "metrics.jsonl"

    @property
    def discarded_metrics(self) -> Path:
        """What `discard_after` took out of `metrics`; there is none before."""
        return self.path / "metrics.discarded.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Holds the `step-N` folders, and `latest` and `best` (`checkpoint_folder`)."""
        return self.path / "checkpoints"

    @property
    def reference(self) -> Path:
        """The weights with which RL began, where that was not the model's folder; a Hugging Face folder."""
        return self.path / "reference"

    def border(self, round_: int, side: Side) -> Path:
        """The policy before or after a round of reheating, with `checkpoint.borders`; a Hugging Face folder."""
        return self.path / "borders" / f"round-{round_}-{side}"

    def compared_borders(self, round_: int) -> Path:
        """Where `reheat compare RUN` writes of a round, and `reheat report` looks."""
        return self.report / f"round-{round_}"

    @property
    def rounds(self) -> list[int]:
        """Whose both sides were kept."""
        after = (self.path / "borders").glob("round-*-after")
        numbers = (folder.name.removeprefix("round-").removesuffix("-after") for folder in after)
        return sorted(int(n) for n in numbers if n.isdecimal() and self.border(int(n), "before").is_dir())

    @property
    def tensorboard(self) -> Path:
        """Event files; only with `logging.tensorboard`."""
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        """Where `reheat report` writes unless it is told otherwise."""
        return self.path / "report"

    @property
    def logs(self) -> Path:
        """What vLLM's processes print, a file for each engine or server, appended to."""
        return self.path / "logs"

    @property
    def saved_step(self) -> int | None:
        """The step of the checkpoint that the run would go on from, None before the first."""
        checkpoint = latest_checkpoint(self.checkpoints)
        return None if checkpoint is None else checkpoint_step(checkpoint)

    def rollouts(self, step: int) -> Path:
        """Completions of one step, one JSON object a line; there is none where nothing was sampled or kept."""
        return self.path / "rollouts" / f"step-{step:06d}.jsonl"

    def create(self, config: Config) -> None:
        """Makes the folders and writes the resolved configuration; an older one is kept as `config.previous-N.yaml`.

        Raises:
            ReheatError: the folder cannot be written.
        """
        self.make_folders()
        try:
            self._write_config(dump_config(config))
        except OSError as error:
            raise self._not_writable(error) from None

    def check(self) -> None:
        """Refuses a folder that could not be written, and leaves nothing behind.

        Raises:
            ConfigError: what is there already, or the nearest folder above, cannot be read and written.
        """
        nearest = self.path.absolute()
        try:
            while not os.path.lexists(nearest):
                nearest = nearest.parent
            os.rmdir(tempfile.mkdtemp(prefix=".reheat-", dir=nearest))
            os.listdir(nearest)
            for path in (self.checkpoints, self.config, self.metrics):
                if not os.path.lexists(path):
                    continue
                if path != self.checkpoints and not path.is_file():
                    raise ConfigError(f"run.folder: {path} is not a file; move it away, or change run.folder")
                if not os.access(path, os.R_OK | os.W_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        except OSError as error:
            raise ConfigError(f"run.folder: {self._not_writable(error)}") from None

    def make_folders(self) -> None:
        """
        Raises:
            ReheatError: the folder cannot be written.
        """
        try:
            for folder in (self.path / "rollouts", self.checkpoints, self.report, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._not_writable(error) from None

    def _not_writable(self, error: OSError) -> ReheatError:
        return ReheatError(f"cannot write run folder {self.path}: {error.strerror}; change run.folder")

    def _write_config(self, text: str) -> None:
        if self.config.exists():
            if self.config.read_bytes() == text.encode():
                return
            number = sum(1 for _ in self.path.glob("config.previous-*.yaml")) + 1
            self.config.replace(self.path / f"config.previous-{number}.yaml")
        write_atomically(self.config, text.encode())

    def discard_after(self, step: int) -> int:
        """Moves metric lines past `step`, and a half-written one, to `metrics.discarded.jsonl`; returns how many.

        Discarded lines are on disk before they leave `metrics.jsonl`, so being killed in between loses nothing.
        """
        if not self.metrics.exists():
            return 0
        kept: list[bytes] = []
        discarded: list[bytes] = []
        for line in self.metrics.read_bytes().splitlines():
            record = _parse(line)
            (kept if record is not None and record["step"] <= step else discarded).append(line)
        if discarded:
            with self.discarded_metrics.open("ab") as file:
                file.write(_joined(discarded))
                file.flush()
                os.fsync(file.fileno())
        write_atomically(self.metrics, _joined(kept))
        return len(discarded)

    def write_rollouts(
        self, step: int, groups: Sequence[Group], decode: Callable[[Sequence[int]], str], limit: int
    ) -> None:
        """Writes the first `limit` groups for inspection, one completion a line; ungraded ones have a null reward."""
        if limit <= 0 or not groups:
            return
        rows = [row for group in groups[:limit] for row in _rollout_rows(step, group, decode)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with writing(self.rollouts(step)):
            # A lone surrogate becomes \udXXX, which is the JSON escape for it.
            write_atomically(self.rollouts(step), text.encode("utf-8", "backslashreplace"))


@dataclass(frozen=True)
class Segment:
    """Metric lines that one folder contributes to a run's history."""

    folder: Path
    records: tuple[Record, ...]


def read_metrics(folder: Path) -> list[Record]:
    """All metric lines of a run in step order, beginning with those of the run it was forked from.

    Raises:
        ReheatError: there is no metrics.jsonl, or a line other than the last is not JSON.
    """
    return [record for segment in read_segments(folder) for record in segment.records]


def read_segments(folder: Path) -> list[Segment]:
    """Like `read_metrics`, but apart by source folder: trunk first, the run's own lines last."""
    return _read_segments(Path(folder), seen=())


def read_config_tree(folder: Path) -> dict[str, Any]:
    """The run's config.yaml unvalidated, so that runs of other versions stay readable; empty if there is none.

    Without secrets, which earlier versions and other hands may have left in it.
    """
    path = RunFolder(Path(folder)).config
    if not path.exists():
        return {}
    try:
        tree = yaml.safe_load(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ReheatError(f"{path} cannot be read: {reason}; put the run's own back, or move it away") from None
    return redact(tree) if isinstance(tree, dict) else {}


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces `path` in one go: a reader, or a kill, sees the old content or the new."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _read_segments(folder: Path, seen: tuple[Path, ...]) -> list[Segment]:
    own = _read_lines(folder)
    tree = read_config_tree(folder)
    fork_from = (tree.get("run") or {}).get("fork_from")
    seen = (*seen, folder.resolve())
    if not own or not fork_from:
        return [Segment(folder, own)]
    trunk = _find_trunk(folder, Path(fork_from))
    if trunk is None or trunk.resolve() in seen:
        warnings.warn(f"{folder}: run.fork_from {fork_from} has no metrics here; its steps are left out", stacklevel=4)
        return [Segment(folder, own)]
    fork_step = next((r["fork_step"] for r in own if "fork_step" in r), own[0]["step"] - 1)
    before = [
        Segment(s.folder, tuple(r for r in s.records if r["step"] <= fork_step)) for s in _read_segments(trunk, seen)
    ]
    return [*before, Segment(folder, own)]


def _find_trunk(folder: Path, fork_from: Path) -> Path | None:
    """As written in the configuration, else next to `folder`: runs that were copied elsewhere together."""
    for candidate in (fork_from, folder.resolve().parent / fork_from.name):
        if RunFolder(candidate).metrics.exists():
            return candidate
    return None


def _read_lines(folder: Path) -> tuple[Record, ...]:
    path = RunFolder(folder).metrics
    if not path.is_file():
        raise ReheatError(f"{folder} holds no metrics.jsonl; name the folder of a run that has logged a step")
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise ReheatError(f"{path}:{number} is not a metrics line; remove that line")
    return tuple(sorted(records, key=lambda r: r["step"]))  # stable: an event stays behind its step


def _parse(line: bytes) -> Record | None:
    """None for a line that was cut short."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _joined(lines: Sequence[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def _rollout_rows(step: int, group: Group, decode: Callable[[Sequence[int]], str]) -> list[Record]:
    rewards = group.rewards or (None,) * len(group.completions)
    return [
        {
            "step": step,
            "prompt_index": group.prompt.index,
            "prompt": group.prompt.text,
            "response": decode(completion.token_ids.tolist()),
            "reward": None if reward is None else reward.value,
            "correct": None if reward is None else reward.correct,
            "timed_out": None if reward is None else reward.timed_out,
            "finish_reason": completion.finish_reason,
            "num_tokens": len(completion.token_ids),
            "sampling_temperature": completion.sampling_temperature,
            "policy_version": completion.policy_version,
            # a text has more than one reading as tokens
            "prompt_ids": list(group.prompt.token_ids),
            "response_ids": completion.token_ids.tolist(),
            **({"reward_parts": dict(reward.parts)} if reward is not None and reward.parts else {}),
        }
        for completion, reward in zip(group.completions, rewards, strict=True)
    ]
