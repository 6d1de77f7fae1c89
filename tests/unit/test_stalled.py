"""The stalled policies' results: curves, differences by seed, table and figure; and that every arm is a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from examples.elsewhere import ROOT
from examples.shares import parser_of, places_of
from examples.stalled.results import CONTROL, STRETCH, Curves, Outcome, Stall, against_control, draw, markdown
from examples.stalled.stalled import ARMS, Settings


def steps(count: int, stage: str = "rlvr", **values: float) -> list[dict[str, Any]]:
    known = {"reward/mean": 0.5, "reward/uniform_group_fraction": 0.7, "entropy/mean": 0.1}
    return [{"stage": stage, **known, **values} for _ in range(count)]


END = {"stage": "rlvr", "eval/avg_at_k": 0.4, "eval/pass_at_k": 0.6, "eval/entropy": 0.2}


def outcome(arm: str, seed: int, avg: float) -> Outcome:
    return Outcome(
        arm, seed, 150, 30 * (arm != CONTROL), avg, avg + 0.2, 0.1, Curves([0.5, 0.6], [0.7, 0.8], [0.1, 0.1])
    )


def stall(seed: int) -> Stall:
    curves = Curves([0.6] * 5 + [0.61] * 5, [0.7] * 10, [0.1] * 10)
    return Stall(seed, 8, 0.3, 0.7, 0.36, 0.57, 0.1, curves)


def test_a_run_is_its_end_and_its_curves_of_rl() -> None:
    records = [*steps(7), *steps(4, "reheat", **{"entropy/mean": 9.0}), *steps(STRETCH, **{"reward/mean": 0.8}), END]
    found = Outcome.of("flatten", 2, 20, records)
    assert (found.avg, found.pass_, found.entropy, found.reheat_steps) == (0.4, 0.6, 0.2, 4)
    assert found.curves.reward == pytest.approx([(7 * 0.5 + 3 * 0.8) / 10, 0.8])
    assert found.curves.entropy == pytest.approx([0.1, 0.1])
    first = {**END, "eval/avg_at_k": 0.1, "eval/pass_at_k": 0.9}
    stalled = Stall.of(3, 8, [first, *steps(100), END])
    assert (stalled.warm_avg, stalled.warm_pass, stalled.avg, stalled.late_gain) == (0.1, 0.9, 0.4, 0.0)


def test_the_late_gain_is_of_fifty_steps_and_the_fifty_before() -> None:
    assert stall(0).late_gain == pytest.approx(0.01)


def test_an_arm_is_compared_with_the_control_of_its_seed() -> None:
    outcomes = [outcome(CONTROL, s, 0.3 + 0.1 * s) for s in range(3)]
    outcomes += [outcome("flatten", s, 0.3 + 0.1 * s + d) for s, d in enumerate((0.01, 0.02, 0.03))]
    outcomes.append(outcome("flatten", 7, 0.9))  # whose control is not done
    mean = against_control(outcomes, "flatten", lambda o: o.avg)
    assert (mean.value, mean.half) == pytest.approx((0.02, 4.303 * 0.01 / 3**0.5))


def test_results_survive_their_files_and_are_drawn(tmp_path: Path) -> None:
    outcomes = [outcome(arm, s, 0.3 + 0.01 * s) for arm in (CONTROL, "reheat-forward") for s in range(3)]
    for one in (*outcomes, *(stalls := [stall(s) for s in range(3)])):
        one.write(tmp_path)
    assert [Stall.read(p) for p in sorted(tmp_path.glob("seed-*/stall.json"))] == stalls
    assert sorted(map(str, (Outcome.read(p) for p in tmp_path.glob("seed-*/arm-*.json")))) == sorted(map(str, outcomes))
    text = markdown(stalls, outcomes)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| arm", "| control", "| reheat-forward"]
    assert "| +0.000 ± 0.000 |" in rows[2] and rows[2].endswith("| 30 |")
    assert "0.300 ± 0.000 -> 0.360 ± 0.000" in text
    draw(stalls, outcomes, tmp_path / "stalled.png")
    assert (tmp_path / "stalled.png").stat().st_size > 10_000


def test_the_table_that_is_kept_is_made_of_the_results_that_are_kept() -> None:
    kept = ROOT / "examples" / "stalled" / "results"
    stalls = [Stall.read(p) for p in sorted(kept.glob("seed-*/stall.json"))]
    outcomes = [Outcome.read(p) for p in sorted(kept.glob("seed-*/arm-*.json"))]
    assert len(stalls) >= 2 and (kept / "table.md").read_text() == markdown(stalls, outcomes)


@pytest.mark.parametrize("quick", [False, True])
def test_every_arm_goes_on_from_the_stalled_policy_with_the_same_rl(tmp_path: Path, quick: bool) -> None:
    settings = Settings(tmp_path / "runs", tmp_path / "results", quick)
    stalled = settings.stalled(4)
    for name in ARMS:
        arm = settings.arm(4, name)
        assert arm.run.fork_from == str(tmp_path / "runs" / "seed-4" / "stalled")
        assert arm.run.steps == settings.stall_steps + settings.arm_steps and arm.run.name == name
        assert (arm.optimizer, arm.data, arm.model, arm.rollout) == (
            stalled.optimizer, stalled.data, stalled.model, stalled.rollout
        )  # fmt: skip
        assert arm.rl == stalled.rl or name == "entropy-bonus"


@pytest.mark.parametrize(
    ("arguments", "runs", "results"),
    [
        ([], "runs/stalled", "examples/stalled/results"),
        (["--quick"], "runs/stalled-quick", "runs/stalled-quick/results"),
        (["--quick", "--runs", "/r"], "/r", "/r/results"),
        (["--runs", "/r", "--results", "/s"], "/r", "/s"),
    ],
)
def test_what_is_worth_keeping_lies_beside_the_script_unless_it_is_quick(
    arguments: list[str], runs: str, results: str
) -> None:
    options = parser_of("", [3, 4]).parse_args(arguments)
    script = ROOT / "examples" / "stalled" / "stalled.py"
    assert places_of(options, script) == (ROOT / runs, ROOT / results) and options.seeds == [3, 4]
