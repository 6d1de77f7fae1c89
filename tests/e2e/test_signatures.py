"""The quick forms of two experiments on one collapsed policy: every run of a seed, cooling among them, tables and figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from examples.signatures.measurements import Measurements
from examples.teachers.results import Outcome
from examples.teachers.teachers import ARMS
from tests.e2e import runs


def run_quickly(experiment: str, place: Path) -> tuple[Path, str]:
    """Its results, and what it printed."""
    results = place / experiment
    places = ["--runs", str(place / "runs"), "--results", str(results)]
    what = ["--quick", "--seeds", "0", "--jobs", "1"]
    command = [sys.executable, "-W", "ignore", "-m", f"examples.{experiment}.{experiment}", *places, *what]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=2 * runs.LIMIT_S)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return results, done.stdout


def test_a_seed_is_measured(tmp_path: Path) -> None:
    results, printed = run_quickly("signatures", tmp_path)
    m = Measurements.read(results / "seed-0.json")
    assert m.entropies["1.2"][0] == m.entropies["1.5"][0] == m.entropies["2.0"][0]  # the same weights and rollouts
    assert len(m.entropies["1.2"]) == len(m.uncollapsed) == len(m.cooling) == m.steps == 4
    assert m.entropies["1.2"][-1] > m.entropies["1.2"][0]
    assert m.forward_norms[0] > m.reverse_norms[0] > 0
    assert 0.8 < m.microscope["overlap"] <= 1 and 0 < m.microscope["kl_ab"] < 1
    assert m.cooled_left > 0
    assert (results / "table.md").read_text() in printed and (results / "signatures.png").stat().st_size > 10_000

    # with the same seed and place, from the same trunk
    before = (tmp_path / "runs" / "seed-0" / "trunk" / "metrics.jsonl").read_bytes()
    results, printed = run_quickly("teachers", tmp_path)
    assert (tmp_path / "runs" / "seed-0" / "trunk" / "metrics.jsonl").read_bytes() == before
    outcomes = {o.arm: o for o in map(Outcome.read, (results / "seed-0").glob("*.json"))}
    assert set(outcomes) == set(ARMS) and {o.collapsed for o in outcomes.values()} == {outcomes["control"].collapsed}
    assert outcomes["control"].border is None and outcomes["flatten"].border is not None
    for name in ("current-1.2", "current-1.5", "frozen-1.5"):
        assert outcomes[name].reheat_steps == 4 and not outcomes[name].reached and outcomes[name].border is not None
    assert outcomes["frozen-1.5"].end != outcomes["current-1.5"].end
    assert (results / "table.md").read_text() in printed and (results / "teachers.png").stat().st_size > 10_000
