"""`checkpoint.keep_best`: which evaluation counts as the best, and that rotation leaves its checkpoint alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_reheat.model.checkpoint import (
    best_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    remove_old_checkpoints,
)
from megatron_reheat.stages.run import Run, RunState


def folder_with(folder: Path, steps: list[int], **pointers: str) -> Path:
    for step in steps:
        (folder / f"step-{step}").mkdir(parents=True)
        (folder / f"step-{step}" / "state.json").write_text("{}")
    for pointer, name in pointers.items():
        (folder / pointer).write_text(name)
    return folder


@pytest.mark.parametrize(
    ("best", "keep", "left"),
    [
        (None, 2, [100, 120]),
        ("step-20", 2, [20, 100, 120]),
        ("step-100", 2, [100, 120]),
        ("step-120", 1, [120]),
        ("step-7", 1, [120]),  # names nothing that is there
        ("step-20", 9, [20, 40, 100, 120]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(best: str | None, keep: int, left: list[int], tmp_path: Path) -> None:
    pointers = {"latest": "step-120"} | ({"best": best} if best else {})
    folder = folder_with(tmp_path, [20, 40, 100, 120], **pointers)
    remove_old_checkpoints(folder, keep)
    assert [path.name for path in list_checkpoints(folder)] == [f"step-{step}" for step in left]
    assert latest_checkpoint(folder) == folder / "step-120"
    assert best_checkpoint(folder) == (folder / best if best and int(best[5:]) in left else None)


def test_a_folder_without_a_best() -> None:
    assert best_checkpoint(Path("nowhere")) is None


def test_an_empty_pointer_names_no_checkpoint(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, [20], latest="", best="")
    assert (latest_checkpoint(folder), best_checkpoint(folder)) == (folder / "step-20", None)


def test_only_a_better_evaluation_is_the_best() -> None:
    run: Any = SimpleNamespace(
        config=SimpleNamespace(checkpoint=SimpleNamespace(keep_best="eval/avg_at_k")), state=RunState()
    )
    seen = [{"reward/mean": 9.0}, {"eval/avg_at_k": 0.0}, {"eval/avg_at_k": 0.0}, {"eval/avg_at_k": 0.5}]
    seen += [{"eval/avg_at_k": 0.25, "eval/pass_at_k": 1.0}, {"eval/avg_at_k": 0.75}]
    assert [Run._is_best(run, metrics) for metrics in seen] == [False, True, False, True, False, True]
    assert run.state.best == {"eval/avg_at_k": 0.75}
    run.config.checkpoint.keep_best = None
    assert not Run._is_best(run, {"eval/avg_at_k": 1.0})
