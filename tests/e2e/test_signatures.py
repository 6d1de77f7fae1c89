"""The signatures' quick form: every run of a seed, cooling among them, table and figure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from examples.signatures.measurements import Measurements
from tests.e2e import runs


def test_a_seed_is_measured(tmp_path: Path) -> None:
    places = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    what = ["--quick", "--seeds", "0", "--jobs", "1"]
    command = [sys.executable, "-W", "ignore", "-m", "examples.signatures.signatures", *places, *what]
    result = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=2 * runs.LIMIT_S)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    m = Measurements.read(tmp_path / "results" / "seed-0.json")
    assert m.entropies["1.2"][0] == m.entropies["1.5"][0] == m.entropies["2.0"][0]  # the same weights and rollouts
    assert len(m.entropies["1.2"]) == len(m.uncollapsed) == len(m.cooling) == m.steps == 4
    assert m.entropies["1.2"][-1] > m.entropies["1.2"][0]
    assert m.forward_norms[0] > m.reverse_norms[0] > 0
    assert 0.8 < m.microscope["overlap"] <= 1 and 0 < m.microscope["kl_ab"] < 1
    assert m.cooled_left > 0
    text = (tmp_path / "results" / "table.md").read_text()
    assert text in result.stdout and (tmp_path / "results" / "signatures.png").stat().st_size > 10_000
