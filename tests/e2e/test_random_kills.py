"""Three of the kills of scripts/faults/random_kills.py, and how it tells what a run was doing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.faults.random_kills import differences, is_same, phase_of
from tests.e2e import runs


@pytest.mark.slow
def test_killed_three_times_a_run_comes_to_the_same_end() -> None:
    """In a process of its own, which becomes the parent of what loses its own."""
    command = [sys.executable, "-W", "ignore", "-m", "scripts.faults.random_kills", "--kills", "3"]
    environment = {**os.environ, "PYTHONPATH": str(runs.ROOT)}
    done = subprocess.run(
        [*command, "--layouts", "one process"],
        cwd=runs.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    table = {line[:28].strip(): line.split()[-1] for line in done.stdout.splitlines() if line.strip()}
    assert (table["kills"], table["equal to the bit"], table["processes left"]) == (
        "3", table["runs that came to their end"], "0",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("calls", "phase"),
    [
        ("", "start-up: imports, data"),
        (
            "__main__:<module> cli:main commands/train:train stages/run:train stages/run:_train stages/run:__init__",
            "start-up: engine, model",
        ),
        ("stages/run:_train stages/run:go stages/run:_restore stages/policy:publish", "start-up: weight sync"),
        ("stages/run:_train stages/run:go stages/run:_step stages/rlvr:step stages/policy:sample", "RL: rollout"),
        (
            "stages/run:_train stages/run:go stages/run:_step stages/reheat:step model/engine:update",
            "reheating: update",
        ),
        ("stages/run:_train stages/run:go stages/run:_step stages/run:_save model/checkpoint_save:begin", "save"),
        (
            "stages/run:_train stages/run:go stages/run:_step stages/run:_finish_save model/checkpoint_save:finish",
            "save",
        ),
    ],
)
def test_what_a_run_was_doing_is_told_by_its_calls(calls: str, phase: str) -> None:
    assert phase_of(calls.split()) == phase


def test_a_difference_of_one_bit_is_seen(tmp_path: Path) -> None:
    one, other = torch.tensor([1.0]), torch.tensor([1.0]).nextafter(torch.tensor([2.0]))
    assert is_same({"a": [one]}, {"a": [one.clone()]}) and not is_same({"a": [one]}, {"a": [other]})
    assert not is_same(one, one.bfloat16()) and not is_same({"a": one}, {}) and not is_same(1, 1.0)
    for name, value in (("one", 1), ("other", 2)):
        (tmp_path / name / "rollouts").mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text(f'{{"step": 1, "stage": "rlvr", "time/a": {value}, "a/b": 0}}\n')
    assert list(differences(tmp_path / "one", tmp_path / "other")) == []
    with (tmp_path / "other" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "stage": "rlvr", "a/b": 0}\n')
    (found,) = differences(tmp_path / "one", tmp_path / "other")
    assert found == "other metrics: lines"
    (tmp_path / "other" / "rollouts" / ".x.partial").touch()
    (found,) = differences(tmp_path / "one", tmp_path / "other")
    assert ".x.partial" in found
