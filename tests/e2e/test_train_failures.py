"""Runs whose engines die, whose loss stays non-finite or whose entropy runs away right after they were killed: they go on,
or end with one error and keep the checkpoint."""

from __future__ import annotations

import os
import signal

import psutil
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megatron_reheat.run_lock import RunLock
from tests.e2e import runs


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    recipe = runs.conversational(runs.recipe(runs.make_policy_folder(root / "model"), root), root, copies=2)
    recipe["reward"]["kind"] = "math"
    return runs.write_recipe(recipe, root / "recipe.yaml")


def test_a_dead_engine_is_replaced_and_counted_until_it_may_not_be_restarted(config):
    process = runs.start(
        "train", str(config), "run.name=dying", "rollout.max_restarts=1", "run.steps=500", "eval.data="
    )
    dying = config.parent / "dying"

    def trained() -> list:
        return [s for s in runs.steps_of(dying) if s["stage"] != "sft"]

    try:
        runs.wait_for(lambda: len(trained()) > 0, process)
        _kill_engine(process)
        runs.wait_for(lambda: trained()[-1]["rollout/engine_restarts"] == 1, process)
        done = trained()[-1]["step"]
        runs.wait_for(lambda: trained()[-1]["step"] >= done + 3, process)
        _kill_engine(process)
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
    assert "data: 52 prompts of 120 records; 68 duplicates left out" in result.stdout
    assert (config.parent / "nan" / "checkpoints" / "step-1").is_dir()


def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(config):
    folder = config.parent / "held"
    with RunLock(folder):
        before = sorted(folder.iterdir())
        result = runs.reheat("train", str(config), "run.name=held", "parallel.data=1")
        assert sorted(folder.iterdir()) == before
    assert result.returncode == 1
    assert result.stderr.count("error:") == 1 and f"is in use by process {os.getpid()} on" in result.stderr


@pytest.fixture(scope="module")
def killed(config):
    """A bfloat16 run that was killed in the middle of reheating, with every step's checkpoint; its name and last step."""
    checkpoints = config.parent / "killed" / "checkpoints"
    process = runs.start(
        "train", str(config), "run.name=killed", "model.dtype=bfloat16", "eval.data=", "reheat.lr=1e-2",
        "controller.max_reheat_steps=400", "run.steps=400", "checkpoint.keep=400",
    )  # fmt: skip
    try:
        runs.wait_for(
            lambda: any(s["stage"] == "reheat" and s["step"] > 9 for s in runs.steps_of(checkpoints.parent)), process
        )
    finally:
        runs.kill(process)
    return "killed", int((checkpoints / "latest").read_text().removeprefix("step-"))


def test_a_fork_from_the_middle_of_a_round_goes_on_with_it(config, killed):
    name, last = killed
    output = runs.train(
        config, "run.name=fork", f"run.fork_from={config.parent / name}", "model.dtype=bfloat16", "eval.data=",
        "reheat.lr=1e-2", "controller.max_reheat_steps=400", f"run.steps={last + 1 - 6}", "parallel.data=1",
    )  # fmt: skip
    assert "entering reheat" not in output
    (step,) = runs.steps_of(config.parent / "fork")
    assert (step["step"], step["stage"], step["round"]) == (last + 1, "reheat", 1) and "event" not in step
    # its own last good weights are those it began with, in another layout
    start, end = (
        _tensors(config.parent / run / "checkpoints" / f"step-{n}") for run, n in ((name, last), ("fork", last + 1))
    )
    masters = [n.removeprefix("optimizer.state.param.") for n in start if n.startswith("optimizer.state.param.")]
    assert masters and all(
        torch.equal(end[f"optimizer.last_good.{n}"], start[f"optimizer.state.param.{n}"]) for n in masters
    )


# the next measured entropy, about 3 nats, is above this ceiling
CEILING = ["controller.collapse_below=1", "controller.reheat_to=2", "controller.runaway_entropy=2.5"]


def test_a_runaway_right_after_a_restart_is_rolled_back_with_master_weights(config, killed):
    name, last = killed
    runs.train(
        config, f"run.name={name}", "model.dtype=bfloat16", "eval.data=", *CEILING,
        f"run.steps={last + 1 - 6}", "checkpoint.keep=400",
    )  # fmt: skip
    folder = config.parent / name
    before, step = runs.steps_of(folder)[-2:]
    assert step["step"] == last + 1 and step["stage"] == "reheat"
    assert "ran away" in step["event"] and "rolled back to the last good step" in step["event"]
    assert step["reheat/rolled_back"] == 1 and step["policy_version"] == before["policy_version"] + 1
    # the weights that the last update began with, to the bit, and no moments
    good, bad, restored = (_tensors(folder / "checkpoints" / f"step-{n}") for n in (last - 1, last, last + 1))
    masters = [n for n in restored if n.startswith("optimizer.state.param.")]
    assert masters and all(torch.equal(restored[n], good[n]) for n in masters)
    assert any(not torch.equal(restored[n], restored[n].bfloat16().float()) for n in masters)
    weights = [n for n in restored if not n.startswith("optimizer.")]
    assert weights and all(torch.equal(restored[n], good[n]) for n in weights)
    assert any(not torch.equal(restored[n], bad[n]) for n in weights)
    assert all(t.eq(0).all() for n, t in restored.items() if n.startswith("optimizer.state.exp_avg"))
    # kept while a round is on, and no longer
    assert any(n.startswith("optimizer.last_good.") for n in bad)
    assert not any(n.startswith("optimizer.last_good.") for n in restored)


def _tensors(checkpoint) -> dict[str, torch.Tensor]:
    whole = checkpoint.parents[1] / f"{checkpoint.name}.pt"
    dcp_to_torch_save(checkpoint, whole)
    return {n: t for n, t in torch.load(whole, weights_only=False).items() if isinstance(t, torch.Tensor)}


def _kill_engine(process) -> None:
    """That of the first rank."""
    children = psutil.Process(process.pid).children(recursive=True)
    (victim,) = (p for p in children if p.name() == "vllm-0")
    os.kill(victim.pid, signal.SIGKILL)
