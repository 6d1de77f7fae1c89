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


def test_a_dead_engine_is_replaced_and_counted(config):
    process = runs.start("train", str(config), "run.name=revived", "eval.data=")
    revived = config.parent / "revived"
    try:
        runs.wait_for(lambda: any(s["stage"] == "rlvr" for s in runs.steps_of(revived)), process)
        _kill_one_engine(process)
        output, errors = process.communicate(timeout=runs.LIMIT_S)
    finally:
        if process.poll() is None:
            runs.kill(process)
    assert process.returncode == 0, output[-1000:] + errors[-3000:]
    steps = [s for s in runs.steps_of(revived) if s["stage"] != "sft"]
    assert [s["step"] for s in steps] == list(range(7, 14))
    assert steps[-1]["rollout/engine_restarts"] == 1
    assert all(s["rollout/mismatch_kl"] < 1e-6 for s in steps)


def test_an_engine_that_may_not_be_restarted_ends_the_run_with_one_error(config):
    process = runs.start("train", str(config), "run.name=dead", "rollout.max_restarts=0", "eval.data=")
    dead = config.parent / "dead"
    try:
        runs.wait_for(lambda: any(s["stage"] == "rlvr" for s in runs.steps_of(dead)), process)
        _kill_one_engine(process)
        _, errors = process.communicate(timeout=runs.LIMIT_S)
    finally:
        if process.poll() is None:
            runs.kill(process)
    assert process.returncode == 1
    assert errors.count("error:") == 1 and "rollout.max_restarts" in errors and "Traceback" not in errors
    assert any((dead / "checkpoints").glob("step-*"))


def test_a_loss_that_stays_non_finite_ends_the_run_and_keeps_the_checkpoint(config):
    result = runs.reheat(
        "train", str(config), "run.name=nan", "sft.lr=1e30", "sft.warmup_steps=0", "sft.steps=12", "eval.data=",
        "optimizer.max_skipped_steps=2", "parallel.data=1", "checkpoint.keep=9",
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.count("error:") == 1 and "optimizer.max_skipped_steps 2" in result.stderr
    assert "update skipped (3 in a row)" in result.stdout
    assert (config.parent / "nan" / "checkpoints" / "step-1").is_dir()


def _kill_one_engine(process) -> None:
    engines = [
        p for p in psutil.Process(process.pid).children(recursive=True) if "rollout.worker" in " ".join(p.cmdline())
    ]
    assert engines
    os.kill(engines[0].pid, signal.SIGKILL)
