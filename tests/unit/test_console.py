"""The terminal: one line a step at any width, and how long it will take."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
from rich.console import Console

from megatron_reheat.console import COLUMNS, StepConsole, fitting

METRICS = {
    "reward/mean": -0.125, "reward/accuracy": 1.0, "entropy/mean": 0.2154, "reheat/kl": 3.2e-5, "rollout/mismatch_kl": 4.1e-4,
    "throughput/tokens_per_s": 123456.0, "time/step_s": 181.25, "time/rollout_s": 120.0, "time/reward_s": 1.5,
    "time/score_s": 10.0, "time/update_s": 40.0, "time/sync_s": 9.75,
}  # fmt: skip


LONG = "competition_problems_of_the_last_three_years"


def lines(width: int | None, *steps: tuple[int, Any], also: Mapping[str, float] = MappingProxyType({})) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=width is not None, width=width, no_color=True, highlight=False)
    shown = StepConsole(543, {"": 8, LONG: 16}, console)
    for step, stage in steps:
        shown.step(step, stage, {**METRICS, **also})
    return [line for line in re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()).splitlines() if line]


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_a_step_is_one_line_of_the_terminal(width: int) -> None:
    header, *rows = lines(width, (541, "rlvr"), (542, "reheat"))
    assert len(rows) == 2 and all(len(line.rstrip()) <= width for line in (header, *rows))
    for title in ("stage", "step", "reward", "acc %", "entropy", "sec", "left"):
        assert title in header
    assert ("KL" in header, "sync" in header) == (True, width >= 120)


@pytest.mark.parametrize("width", [80, 160, None])
def test_so_is_an_evaluation_whatever_the_suite_is_called(width: int | None) -> None:
    names = ("avg_at_k", "pass_at_k", "entropy")
    evaluated = {f"eval/{suite}{name}": 0.5 for suite in ("", f"{LONG}/") for name in names}
    _, _, own, suite = lines(width, (1, "rlvr"), also=evaluated)
    assert own.endswith("1/543  avg@8 0.500  pass@8 0.500  entropy 0.500")
    assert "avg@16 0.500  pass@16 0.500  entropy 0.500  competition" in suite
    assert suite.endswith(LONG) == (width != 80) and len(suite) <= (width or 200)


def test_a_file_gets_all_columns() -> None:
    header, _ = lines(None, (1, "rlvr"))
    assert all(column.title in header for column in COLUMNS)


def test_a_narrow_terminal_keeps_what_matters() -> None:
    assert [c.title for c in fitting(20)] == ["reward", "acc %", "entropy", "sec", "left"]


def test_the_time_left_follows_the_steps_after_the_warm_start(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1000.0, 1060.0, 1180.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    _, *rows = lines(160, (3, "sft"), (4, "rlvr"), (5, "rlvr"), (6, "reheat"))
    assert [row.split()[-1] for row in rows] == ["-", "-", "8h58", "13h25"]  # 538 steps of 60 s, 537 of 90 s
