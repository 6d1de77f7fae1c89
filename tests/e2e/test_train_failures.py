"""Runs whose engines die or whose loss stays non-finite: they go on, or end with one error and keep the checkpoint."""

from __future__ import annotations

import os
import signal

import psutil
import pytest

from tests.e2e import runs


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    return runs.write_recipe(runs.recipe(runs.make_model_folder(root / "model"), root), root / "recipe.yaml")


def test_a_dead_engine_is_replaced_and_counted_until_it_may_not_be_restarted(config):
    process = runs.start(
        "train", str(config), "run.name=dying", "rollout.max_restarts=1", "run.steps=500", "eval.data="
    )
    dying = config.parent / "dying"

    def trained() -> list:
        return [s for s in runs.steps_of(dying) if s["stage"] != "sft"]

    try:
        runs.wait_for(lambda: len(trained()) > 0, process)
        rank = _kill_one_engine(process)
        runs.wait_for(lambda: trained()[-1]["rollout/engine_restarts"] == 1, process)
        done = trained()[-1]["step"]
        runs.wait_for(lambda: trained()[-1]["step"] >= done + 3, process)
        _kill_one_engine(process, of_rank=rank)
        _, errors = process.communicate(timeout=runs.LIMIT_S)
    finally:
        if process.poll() is None:
            runs.kill(process)
    steps = trained()
    assert [s["step"] for s in steps] == list(range(7, 7 + len(steps)))  # none is lost and none is done twice
    assert all(s["rollout/mismatch_kl"] < 1e-6 for s in steps)
    assert process.returncode == 1
    assert errors.count("error:") == 1 and "rollout.max_restarts" in errors and "Traceback" not in errors
    assert any((dying / "checkpoints").glob("step-*"))


def test_a_loss_that_stays_non_finite_ends_the_run_and_keeps_the_checkpoint(config):
    result = runs.reheat(
        "train", str(config), "run.name=nan", "sft.lr=1e30", "sft.warmup_steps=0", "sft.steps=12", "eval.data=",
        "optimizer.max_skipped_steps=2", "parallel.data=1", "checkpoint.keep=9",
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.count("error:") == 1 and "optimizer.max_skipped_steps 2" in result.stderr
    assert "update skipped (3 in a row)" in result.stdout
    assert (config.parent / "nan" / "checkpoints" / "step-1").is_dir()


def _kill_one_engine(process, of_rank: int | None = None) -> int:
    """Kills an engine, the one of the rank with process id `of_rank` if given; returns its rank's process id."""
    children = psutil.Process(process.pid).children(recursive=True)
    engines = [p for p in children if "rollout.worker" in " ".join(p.cmdline())]
    victim = next(p for p in engines if of_rank in (None, p.ppid()))
    rank = victim.ppid()
    os.kill(victim.pid, signal.SIGKILL)
    return rank
