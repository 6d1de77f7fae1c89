"""Sampled answers of a run with their verdicts, at the steps where something changed: read from its `rollouts/`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_reheat.analysis.tracks import Track, number, stage_name
from megatron_reheat.run_folder import Record, RunFolder

MAX_STEPS, MAX_PROMPTS, MAX_ANSWERS = 12, 2, 4  # a step's prompts, a prompt's answers: the first of them
HEAD_CHARS, TAIL_CHARS = 900, 500  # of a long text: an answer often stands at its end


@dataclass(frozen=True)
class Excerpt:
    """`num_cut` characters between `head` and `tail` are left out."""

    head: str
    num_cut: int = 0
    tail: str = ""

    @classmethod
    def of(cls, text: Any) -> Excerpt:
        """All of `text`, or its first HEAD_CHARS and last TAIL_CHARS characters; empty for what is no text."""
        text = text if isinstance(text, str) else ""
        num_cut = len(text) - HEAD_CHARS - TAIL_CHARS
        return cls(text) if num_cut <= 0 else cls(text[:HEAD_CHARS], num_cut, text[-TAIL_CHARS:])


@dataclass(frozen=True)
class Answer:
    """`correct` is None where nothing was graded, as in reheating. `notes` are the facts beside the verdict."""

    correct: bool | None
    notes: tuple[str, ...]
    text: Excerpt


@dataclass(frozen=True)
class SampledPrompt:
    """A prompt with the first MAX_ANSWERS of its answers."""

    text: Excerpt
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class SampledStep:
    """`place` says why this step is shown; `num_damaged` lines of `file` could not be read."""

    step: int
    stage: str
    place: str
    file: Path
    prompts: tuple[SampledPrompt, ...]
    num_damaged: int


def sampled_steps(track: Track) -> list[SampledStep]:
    """The first and last sampled step, and those before and after each stage border; MAX_STEPS at most, the last included."""
    written = {path.name for path in RunFolder(track.folder).rollouts(0).parent.glob("step-*.jsonl")}
    stages = {r["step"]: stage_name(r) for r in track.records if "stage" in r}
    sampled = [
        (step, stage) for step, stage in stages.items() if RunFolder(track.folder).rollouts(step).name in written
    ]
    places = _places(sampled)
    chosen = list(places) if len(places) <= MAX_STEPS else [*list(places)[: MAX_STEPS - 1], list(places)[-1]]
    return [_read_step(RunFolder(track.folder).rollouts(step), step, stages[step], places[step]) for step in chosen]


def _places(sampled: Sequence[tuple[int, str]]) -> dict[int, str]:
    places: dict[int, list[str]] = {}
    for (step, stage), (next_step, next_stage) in itertools.pairwise(sampled):
        if stage != next_stage:
            places.setdefault(step, []).append(f"end of {stage}")
            places.setdefault(next_step, []).append(f"start of {next_stage}")
    if sampled:
        places.setdefault(sampled[0][0], []).insert(0, "first")
        if len(sampled) > 1:
            places.setdefault(sampled[-1][0], []).append("last")
    return {step: ", ".join(places[step]) for step in sorted(places)}


def _read_step(file: Path, step: int, stage: str, place: str) -> SampledStep:
    prompts: list[SampledPrompt] = []
    damaged = 0
    for _, group in itertools.groupby(
        _rows(file), key=lambda row: row and (row.get("prompt_index"), row.get("prompt"))
    ):
        rows = list(group)
        if rows[0] is None:
            damaged += len(rows)
            continue
        if len(prompts) == MAX_PROMPTS:
            break  # a file may hold all that a step sampled
        answers = tuple(_answer(row) for row in rows[:MAX_ANSWERS] if row is not None)
        prompts.append(SampledPrompt(Excerpt.of(rows[0].get("prompt")), answers))
    return SampledStep(step, stage, place, file, tuple(prompts), damaged)


def _rows(file: Path) -> Iterator[Record | None]:
    """None for a line that is no answer; one for a file that cannot be read."""
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                yield row if isinstance(row, dict) else None
    except OSError:
        yield None


def _answer(row: Record) -> Answer:
    correct = row.get("correct")
    notes = []
    if (reward := number(row.get("reward"))) is not None:
        notes.append(f"reward {reward:g}")
    parts = row.get("reward_parts")
    for name, value in parts.items() if isinstance(parts, dict) else ():
        if (part := number(value)) is not None:
            notes.append(f"{name} {part:g}")
    if row.get("timed_out") is True:
        notes.append("grading timed out")
    if (num_tokens := number(row.get("num_tokens"))) is not None:
        notes.append(f"{num_tokens:g} tokens")
    if row.get("finish_reason") == "length":
        notes.append("cut off at the longest length allowed")
    return Answer(correct if isinstance(correct, bool) else None, tuple(notes), Excerpt.of(row.get("response")))
