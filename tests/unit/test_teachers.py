"""Outcomes of the teachers' experiment: what a border is, and what is compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from examples.signatures.measurements import Score
from examples.teachers.results import AVG_AT_BORDER, Outcome, against, markdown

COLLAPSED = Score(0.5, 0.6, 0.2)


def record(stage: str, avg: float | None = None, **more: Any) -> dict[str, Any]:
    scores = {} if avg is None else {"eval/avg_at_k": avg, "eval/pass_at_k": avg + 0.1, "eval/entropy": 0.25}
    return {"stage": stage, **scores, **more}


def test_the_border_is_where_reheating_ended_or_the_policy_was_flattened(tmp_path: Path) -> None:
    steps = [
        record("reheat"),
        record("reheat", 0.3, event="entropy 0.24 > 0.23 nats: reheated, back to RL"),
        record("rlvr", 0.4),
    ]
    reheated = Outcome.of("frozen-1.5", 2, COLLAPSED, steps)
    assert (reheated.reheat_steps, reheated.reached, reheated.border, reheated.end.avg) == (
        2,
        True,
        Score(0.3, 0.4, 0.25),
        0.4,
    )
    capped = Outcome.of(
        "current-1.5", 2, COLLAPSED, [record("reheat", 0.2, event="80 reheating steps done"), steps[-1]]
    )
    assert (capped.reached, capped.border) == (False, Score(0.2, 0.30000000000000004, 0.25))
    late = [record("rlvr"), record("rlvr", 0.35, **{"flatten/temperature": 1.1}), record("rlvr", 0.45)]
    flattened = Outcome.of("flatten", 2, COLLAPSED, late)
    assert flattened.reached and flattened.border is not None and flattened.border.avg == 0.35
    control = Outcome.of("control", 2, COLLAPSED, [record("rlvr", 0.4)])
    assert control.border is None and math.isnan(AVG_AT_BORDER(control))
    reheated.write(tmp_path)
    assert Outcome.read(tmp_path / Outcome.file("frozen-1.5", 2)).end == reheated.end

    outcomes = [reheated, capped, flattened, control]
    assert round(against(outcomes, "frozen-1.5", "flatten", AVG_AT_BORDER).value, 6) == -0.05
    table = markdown(outcomes)
    assert "| flatten | -0.150 | -0.050 |" in table and "| current-1.5 |  | +0.100 |" in table
    assert "| control | 1 |  |  |  | 0.400 | 0.500 | 0 |  |" in table
