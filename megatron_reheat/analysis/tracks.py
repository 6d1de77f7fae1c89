"""Metrics of several runs as tracks: a shared trunk appears once, each run keeps what lies after its fork."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_reheat.errors import ReheatError, printable
from megatron_reheat.run_folder import Record, Segment, read_config_tree, read_segments

RealArray = NDArray[np.float64]


@dataclass(frozen=True)
class Span:
    """A stretch of steps `(start, end]` in one stage and round."""

    stage: str
    round: int
    start: int
    end: int


@dataclass(frozen=True)
class Track:
    """One line of the report. `before` is the history that leads up to `records`: the trunk of a forked run."""

    name: str
    folder: Path
    config: dict[str, Any]
    before: tuple[Record, ...]
    records: tuple[Record, ...]
    is_trunk: bool

    def setting(self, *keys: str) -> Any:
        """What config.yaml says under `keys`, None where it says nothing."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def num_samples(self, suite: str = "") -> int | None:
        """k of an evaluation's avg@k and pass@k; `suite` is empty for `eval.data`."""
        own = self.setting("eval", "suites", suite, "num_samples") if suite else None
        k = number(self.setting("eval", "num_samples") if own is None else own)
        return None if k is None else int(k)

    def has(self, metric: str) -> bool:
        """Whether its own records, without those of `before`, hold a finite value."""
        return any(number(r.get(metric)) is not None for r in self.records)

    def values(self, metric: str) -> list[float]:
        """In step order, without what is missing or null."""
        return [value for r in self.records if (value := number(r.get(metric))) is not None]

    def elapsed_s(self) -> dict[int, float]:
        """Wall-clock seconds from the beginning of the track's first step to the end of each, pauses included."""
        stamped = [(r["step"], when, r) for r in self.records if (when := number(r.get("time/unix_s"))) is not None]
        if not stamped:
            return {}
        _, first, record = stamped[0]
        # a line is written when its step is over
        began = first - sum(number(record.get(f"time/{part}_s")) or 0.0 for part in ("step", "eval"))
        return {step: max(when - began, 0.0) for step, when, _ in stamped}

    def series(self, metric: str, window: int = 1) -> tuple[RealArray, RealArray]:
        """Steps and values [N] of this track, begun at the last point of `before` so that lines meet.

        Values are means over the trailing `window` logged steps, history included; a null is a NaN.
        """
        logged = [(r["step"], r[metric]) for r in (*self.before, *self.records) if metric in r]
        num_before = sum(metric in r for r in self.before)
        steps = np.array([step for step, _ in logged], dtype=np.float64)
        finite = [number(value) for _, value in logged]
        values = np.array([np.nan if value is None else value for value in finite], dtype=np.float64)
        first = max(num_before - 1, 0)
        return steps[first:], trailing_mean(values, window)[first:]

    def spans(self) -> list[Span]:
        """Of its own records; the first begins where `before` ends."""
        begin = next((r["step"] for r in reversed(self.before) if "stage" in r), None)
        return stage_spans(self.records, begin)

    def events(self) -> list[tuple[int, str]]:
        """(step, text) in step order."""
        return [(r["step"], str(r["event"])) for r in self.records if r.get("event")]


def number(value: Any) -> float | None:
    """None for a null, and for all else that is no finite number."""
    return float(value) if isinstance(value, int | float) and abs(value) <= sys.float_info.max else None


def stage_name(record: Record) -> str:
    """With its round where that is counted: `reheat round 2`."""
    return f"{record['stage']} round {record['round']}" if record.get("round") else str(record["stage"])


def stage_spans(records: Sequence[Record], begin: int | None = None) -> list[Span]:
    """Groups consecutive steps of one stage and round; a record covers the steps since the one before it.

    `begin` is the last step before the records; without it the first record covers one step.
    """
    spans: list[Span] = []
    for record in records:
        if "stage" not in record:
            continue
        stage, round_, step = record["stage"], record.get("round", 0), record["step"]
        if spans and (spans[-1].stage, spans[-1].round) == (stage, round_):
            spans[-1] = replace(spans[-1], end=step)
        else:
            start = spans[-1].end if spans else (step - 1 if begin is None else begin)
            spans.append(Span(stage, round_, start, step))
    return spans


def trailing_mean(values: RealArray, window: int) -> RealArray:
    """Mean over the last `window` values [N], NaN left out; NaN stays NaN."""
    if window <= 1:
        return values
    smoothed = np.full_like(values, np.nan)
    for i in range(len(values)):
        recent = values[max(0, i - window + 1) : i + 1]
        if np.isfinite(values[i]):
            smoothed[i] = np.nanmean(recent)
    return smoothed


def visible_steps(tracks: Sequence[Track]) -> tuple[float, float]:
    """First and last step to show: a long sft warm start is cut so that it takes a tenth of the width, at most."""
    spans = [span for track in tracks for span in track.spans()]
    if not spans:
        steps = [r["step"] for track in tracks for r in track.records]
        return min(steps) - 0.5, max(steps) + 0.5
    start, end = min(s.start for s in spans), max(s.end for s in spans)
    after_sft = [s.start for s in spans if s.stage != "sft"]
    if after_sft:
        start = max(start, round(min(after_sft) - 0.11 * (end - min(after_sft))))
    return start, end + 0.01 * (end - start)


def load_tracks(run_folders: Sequence[Path]) -> list[Track]:
    """Trunks first, in the order they are met, then one track for each run.

    Raises:
        ReheatError: no folder is given, or one holds no metrics; the message names it.
    """
    if not run_folders:
        raise ReheatError("a report needs at least one run folder")
    runs: dict[Path, list[Segment]] = {}
    for folder in run_folders:
        segments = read_segments(Path(folder))
        if not any(segment.records for segment in segments):
            raise ReheatError(f"{folder}/metrics.jsonl is empty; wait for the run's first step")
        runs.setdefault(Path(folder).resolve(), segments)

    trunks: dict[Path, Track] = {}
    for segments in runs.values():
        for i, segment in enumerate(segments[:-1]):
            key = segment.folder.resolve()
            if key not in trunks or _last_step(segment.records) > _last_step(trunks[key].records):
                trunks[key] = _track(segments[: i + 1], segment.records, is_trunk=True)
    tracks = [track for track in trunks.values() if track.records]
    for key, segments in runs.items():
        own = segments[-1]
        shared = _last_step(trunks[key].records) if key in trunks else -1
        inside = tuple(r for r in own.records if r["step"] <= shared)
        rest = own.records[len(inside) :]
        if rest:
            arm = _track([*segments[:-1], Segment(own.folder, inside), own], rest, is_trunk=False)
            tracks.append(replace(arm, name=f"{arm.name} (continued)") if inside else arm)
    return _with_distinct_names(tracks)


def _track(segments: Sequence[Segment], records: tuple[Record, ...], *, is_trunk: bool) -> Track:
    folder = segments[-1].folder
    config = read_config_tree(folder)
    before = tuple(record for segment in segments[:-1] for record in segment.records)
    track = Track("", folder, config, before, records, is_trunk)
    name = printable(str(track.setting("run", "name") or folder.resolve().name))
    return replace(track, name=f"{name} (trunk)" if is_trunk else name)


def _with_distinct_names(tracks: list[Track]) -> list[Track]:
    count = Counter(track.name for track in tracks)
    return [replace(t, name=printable(f"{t.name} [{t.folder}]")) if count[t.name] > 1 else t for t in tracks]


def _last_step(records: Sequence[Record]) -> int:
    return records[-1]["step"] if records else -1
