"""The entropy arena's quick form: warm start, two methods with and without reheating, table and figure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from examples.entropy_arena.results import read_all
from tests.e2e import runs


def arena(folder: Path) -> subprocess.CompletedProcess[str]:
    places = ["--runs", str(folder / "runs"), "--results", str(folder / "results")]
    what = ["--quick", "--steps", "4", "--seeds", "0", "--methods", "grpo", "avspo", "--jobs", "1"]
    command = [sys.executable, "-W", "ignore", "-m", "examples.entropy_arena.arena", *places, *what]
    return subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=2 * runs.LIMIT_S)


def test_every_contest_is_on_record(tmp_path: Path) -> None:
    result = arena(tmp_path)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    found = {(r.method, r.reheat): r for r in read_all(tmp_path / "results")}
    assert found.keys() == {(m, r) for m in ("grpo", "avspo") for r in (False, True)}
    for r in found.values():
        assert r.error is None and len(r.curve) == r.steps == 4 and r.rounds == r.reheat
        assert 0 <= r.avg <= r.pass_ <= 1 and r.entropy > 0 and r.tokens > 0 and r.seconds > 0
    assert any(r.gradient_norm > 0 for r in found.values())
    grpo, avspo = found["grpo", False], found["avspo", False]
    assert grpo.curve[0] == avspo.curve[0] == found["grpo", True].curve[0]  # from one warm start
    assert {line.split("|")[1].strip() for line in result.stdout.splitlines() if line.startswith("| ")} == {
        "method", "grpo", "grpo + reheating", "avspo", "avspo + reheating"
    }  # fmt: skip
    assert (tmp_path / "results" / "table.md").read_text() in result.stdout
    assert (tmp_path / "results" / "arena.png").stat().st_size > 10_000
