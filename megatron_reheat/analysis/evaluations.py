"""The evaluations of a run, read from its metrics: `eval/avg_at_k` of `eval.data`, `eval/NAME/avg_at_k` of a suite."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_reheat.analysis.tracks import Track, number, stage_name
from megatron_reheat.run_folder import Record

_METRIC = re.compile(r"eval/(?:(?P<suite>.+)/)?(?:avg_at_k|pass_at_k|entropy|response_length)", re.DOTALL)


@dataclass(frozen=True)
class Estimate:
    """A mean, with the ends of its 95% interval where they were logged."""

    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, record: Record, metric: str) -> Estimate:
        """`metric` of one record; without both ends of the interval there is none."""
        low, high = number(record.get(f"{metric}_low")), number(record.get(f"{metric}_high"))
        known = low is not None and high is not None
        return cls(number(record.get(metric)), low if known else None, high if known else None)


@dataclass(frozen=True)
class Evaluation:
    """One suite at one step; `suite` is empty for `eval.data`.

    `border` says which stage begins or ends there, or forks; empty in the middle of a stage.
    """

    run: str
    step: int
    stage: str
    border: str
    suite: str
    k: int | None
    avg: Estimate
    passed: Estimate
    entropy: float | None
    response_length: float | None
    elapsed_s: float | None


def evaluations(track: Track) -> list[Evaluation]:
    """In step order; the suites of a step by name, `eval.data` first."""
    staged = [r for r in track.records if "stage" in r]
    elapsed = track.elapsed_s()
    rows = []
    for i, record in enumerate(staged):
        for suite in _suites([record]):
            prefix = f"eval/{suite}/" if suite else "eval/"
            rows.append(
                Evaluation(
                    run=track.name,
                    step=record["step"],
                    stage=stage_name(record),
                    border=_border(track, staged, i),
                    suite=suite,
                    k=track.num_samples(suite),
                    avg=Estimate.of(record, f"{prefix}avg_at_k"),
                    passed=Estimate.of(record, f"{prefix}pass_at_k"),
                    entropy=number(record.get(f"{prefix}entropy")),
                    response_length=number(record.get(f"{prefix}response_length")),
                    elapsed_s=elapsed.get(record["step"]),
                )
            )
    return rows


def suites_of(tracks: Sequence[Track]) -> list[str]:
    """Names of what was evaluated, sorted: `eval.data`, which has none, comes first."""
    return _suites(record for track in tracks for record in track.records)


def _suites(records: Iterable[Record]) -> list[str]:
    matches = (_METRIC.fullmatch(key) for record in records for key in record)
    return sorted({match["suite"] or "" for match in matches if match})


def _border(track: Track, staged: Sequence[Record], i: int) -> str:
    record, step = staged[i], staged[i]["step"]
    following = next((r for r in staged[i + 1 :] if r["step"] > step), None)
    before = [r for r in (*track.before, *staged[:i]) if "stage" in r and r["step"] < step]
    if following is None and track.is_trunk:
        return f"fork in {stage_name(record)}"
    if following is None or stage_name(following) != stage_name(record):
        return f"end of {stage_name(record)}"
    if not before or stage_name(before[-1]) != stage_name(record):
        return f"start of {stage_name(record)}"
    return ""
