"""The stalled policies' quick form: a seed with two arms, and that the same command repeats nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from examples.stalled.results import Outcome, Stall
from tests.e2e import runs


def test_a_seed_with_two_arms(tmp_path: Path) -> None:
    places = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    what = ["--quick", "--seeds", "3", "--jobs", "1", "--arms", "control", "reheat-forward"]
    command = [sys.executable, "-W", "ignore", "-m", "examples.stalled.stalled", *places, *what]

    def run() -> str:
        result = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=runs.LIMIT_S)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
        return result.stdout

    said = run()
    results = tmp_path / "results" / "seed-3"
    stall, *arms = Stall.read(results / "stall.json"), *map(Outcome.read, sorted(results.glob("arm-*.json")))
    control, reheated = arms
    assert (control.arm, reheated.arm, control.reheat_steps) == ("control", "reheat-forward", 0)
    assert reheated.reheat_steps > 0 and control.steps == reheated.steps == 10
    assert len(control.curves.reward) == 1 and 0 <= stall.avg <= stall.pass_ <= 1
    assert "seed 3 is done" in said and "| reheat-forward | 1 |" in said
    again = run()
    assert "is done" not in again and "| reheat-forward | 1 |" in again
