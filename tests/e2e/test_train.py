"""Whole runs on two processes: every stage, killed and resumed, forked, tensor- and pipeline-parallel, with dying engines."""

from __future__ import annotations

import math
import os
import re
import signal
import time

import psutil
import pytest

from tests.e2e import runs

KEEP_BEST = "checkpoint.keep_best=eval/avg_at_k"
STAGES = ["rlvr", "rlvr", "reheat", "reheat", "reheat", "rlvr", "rlvr"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    runs.make_model_folder(root / "model")
    return root


@pytest.fixture(scope="module")
def whole(root):
    """One uninterrupted run through every stage; the others are compared with it."""
    config = runs.write_recipe(runs.recipe(root / "model", root), root / "whole.yaml")
    result = runs.reheat("train", str(config), "run.name=whole", KEEP_BEST)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return config, root / "whole", result


def test_every_stage_runs_and_is_on_record(whole):
    _, folder, _ = whole
    steps = runs.steps_of(folder)
    trained = [s for s in steps if s["stage"] != "sft"]
    assert [s["step"] for s in trained] == list(range(7, 14))
    assert [s["stage"] for s in trained] == STAGES
    assert [s["round"] for s in trained] == [0, 0, 1, 1, 1, 1, 1]
    # the last reheating step measures and stops without an update, so it keeps the version
    assert [s["policy_version"] for s in trained] == [7, 8, 9, 10, 10, 11, 12]
    for s in trained:
        assert s["rollout/mismatch_kl"] < 1e-6
        assert 0 < s["entropy/mean"] < math.log(22)
    assert all(s["reheat/kl"] > 0 for s in trained if s["stage"] == "reheat")
    events = [s["event"] for s in trained if "event" in s]
    assert len(events) == 2 and "entering reheat round 1" in events[0] and "reheating steps done" in events[1]
    evaluated = [s["step"] for s in steps if "eval/pass_at_k" in s]
    assert evaluated == [6, 8, 11, 13]  # warm start, collapse, reheated, end
    assert all(s["eval/pass_at_k"] >= s["eval/avg_at_k"] >= 0 for s in steps if "eval/pass_at_k" in s)


def test_reheating_raises_and_sft_lowers_what_they_should(whole):
    steps = runs.steps_of(whole[1])
    losses = [s["sft/loss"] for s in steps if "sft/loss" in s]
    assert losses[-1] < losses[0]
    before, after = (s["entropy/mean"] for s in steps if s["stage"] == "reheat" and s["step"] in (9, 11))
    assert after > before


def test_run_folder_is_complete_and_the_terminal_is_readable(whole):
    _, folder, result = whole
    assert (folder / "config.yaml").is_file() and any((folder / "tensorboard").iterdir())
    assert (folder / "rollouts" / "step-000007.jsonl").is_file()
    accuracies = {s["step"]: s["eval/avg_at_k"] for s in runs.steps_of(folder) if "eval/avg_at_k" in s}
    best = max(accuracies, key=lambda step: accuracies[step])  # the first of equals
    assert (folder / "checkpoints" / "best").read_text() == f"step-{best}"
    assert {p.name for p in (folder / "checkpoints").glob("step-*")} == {f"step-{s}" for s in (best, 11, 12, 13)}
    lines = result.stdout.splitlines()
    assert sum(bool(re.match(r"(rlvr|reheat)\s+\d+/13", line)) for line in lines) == 7
    assert any("ready" in line and "first weight sync" in line for line in lines)
    assert "\x1b[" not in result.stdout and "Traceback" not in result.stderr


def test_a_report_is_drawn_from_it(whole):
    _, folder, _ = whole
    result = runs.reheat("report", str(folder))
    assert result.returncode == 0, result.stderr
    assert (folder / "report" / "report.html").stat().st_size > 10_000


def test_nothing_is_done_twice_when_a_finished_run_is_started_again(whole):
    config, folder, _ = whole
    before = runs.steps_of(folder)
    result = runs.reheat("train", str(config), "run.name=whole", KEEP_BEST)
    assert result.returncode == 0 and "nothing to do" in result.stdout
    assert runs.steps_of(folder) == before


def test_killed_in_the_middle_of_reheating_it_resumes_bit_exactly(whole):
    config, folder, _ = whole
    killed = folder.parent / "killed"
    process = runs.start("train", str(config), "run.name=killed", KEEP_BEST)
    try:
        _wait_for(lambda: any(s["stage"] == "reheat" for s in runs.steps_of(killed)), process)
    finally:
        runs.kill(process)
    done = len(runs.steps_of(killed))
    resumed = runs.reheat("train", str(config), "run.name=killed", KEEP_BEST)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    expected, actual = runs.steps_of(folder), runs.steps_of(killed)
    assert done < len(expected)
    assert [runs.numbers_of(s) for s in actual] == [runs.numbers_of(s) for s in expected]
    assert (killed / "checkpoints" / "best").read_text() == (folder / "checkpoints" / "best").read_text()


@pytest.fixture(scope="module")
def trunk(whole):
    """The same run, told to stop at its collapse."""
    config, folder, _ = whole
    result = runs.reheat("train", str(config), "run.name=trunk", "controller.action=stop")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "collapsed, stopping" in result.stdout
    return folder.parent / "trunk"


def test_an_arm_goes_on_where_its_trunk_stopped(whole, trunk):
    config, folder, _ = whole
    assert runs.steps_of(trunk)[-1]["step"] == 8
    arm = runs.reheat("train", str(config), "run.name=arm", f"run.fork_from={trunk}", "run.steps=3", "eval.data=")
    assert arm.returncode == 0, arm.stderr[-3000:]
    steps = runs.steps_of(folder.parent / "arm")
    assert [(s["step"], s["stage"]) for s in steps] == [(9, "reheat")]
    # the same weights, seeds and data as the run that never stopped
    expected = next(s for s in runs.steps_of(folder) if s["step"] == 9)
    assert steps[0]["entropy/mean"] == expected["entropy/mean"] and steps[0]["reheat/kl"] == expected["reheat/kl"]


def test_a_runaway_is_rolled_back_to_the_last_good_weights(whole, trunk):
    config, folder, _ = whole
    # any rise of the entropy counts as a jump, so the first reheating step's update is taken back by the second
    jumpy = ["controller.runaway_jump=1e-12", "reheat.lr=1e-2", "run.steps=4"]
    result = runs.reheat("train", str(config), "run.name=runaway", f"run.fork_from={trunk}", *jumpy)
    assert result.returncode == 0, result.stderr[-3000:]
    steps = runs.steps_of(folder.parent / "runaway")
    assert [s["stage"] for s in steps] == ["reheat", "reheat"]
    assert "ran away" in steps[1]["event"] and steps[1]["entropy/mean"] > steps[0]["entropy/mean"]
    # the evaluation at the border sees the trunk's weights again, bit for bit, under a new version
    collapsed = runs.steps_of(trunk)[-1]
    for name in ("eval/avg_at_k", "eval/pass_at_k", "eval/entropy"):
        assert steps[1][name] == collapsed[name]
    assert steps[1]["policy_version"] == collapsed["policy_version"] + 2


@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_other_layouts_train_the_same_policy(whole, layout):
    """An engine on each rank samples from the weights a TP=2 or PP=2 trainer exports; all agree on every sampled token."""
    config, folder, _ = whole
    other = ["parallel.data=1", f"parallel.{layout}=2", f"run.name={layout}", "run.steps=3", "eval.data="]
    other += ["rollout.mode=colocated", "rollout.verify_every=1"]
    launcher = runs.torchrun if layout == "tensor" else runs.reheat  # both ways of starting it
    result = launcher("train", str(config), *other)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 engine(s)" in result.stdout
    steps = [s for s in runs.steps_of(folder.parent / layout) if s["stage"] != "sft"]
    assert [s["stage"] for s in steps] == STAGES[:3]
    assert all(s["rollout/mismatch_abs_max"] <= 1e-3 for s in steps)


def test_a_dead_engine_is_replaced_and_counted(whole):
    config, folder, _ = whole
    process = runs.start("train", str(config), "run.name=revived", "eval.data=")
    revived = folder.parent / "revived"
    try:
        _wait_for(lambda: any(s["stage"] == "rlvr" for s in runs.steps_of(revived)), process)
        _kill_one_engine(process)
        output, errors = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            runs.kill(process)
    assert process.returncode == 0, output[-1000:] + errors[-3000:]
    steps = [s for s in runs.steps_of(revived) if s["stage"] != "sft"]
    assert [s["step"] for s in steps] == list(range(7, 14))
    assert steps[-1]["rollout/engine_restarts"] == 1
    assert all(s["rollout/mismatch_kl"] < 1e-6 for s in steps)


def test_an_engine_that_may_not_be_restarted_ends_the_run_with_one_error(whole):
    config, folder, _ = whole
    process = runs.start("train", str(config), "run.name=dead", "rollout.max_restarts=0", "eval.data=")
    dead = folder.parent / "dead"
    try:
        _wait_for(lambda: any(s["stage"] == "rlvr" for s in runs.steps_of(dead)), process)
        _kill_one_engine(process)
        _, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            runs.kill(process)
    assert process.returncode == 1
    assert errors.count("error:") == 1 and "rollout.max_restarts" in errors and "Traceback" not in errors
    assert any((dead / "checkpoints").glob("step-*"))


def test_a_loss_that_stays_non_finite_ends_the_run_and_keeps_the_checkpoint(whole):
    config, folder, _ = whole
    result = runs.reheat(
        "train", str(config), "run.name=nan", "sft.lr=1e30", "sft.warmup_steps=0", "sft.steps=12", "eval.data=",
        "optimizer.max_skipped_steps=2", "parallel.data=1", "checkpoint.keep=9",
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.count("error:") == 1 and "optimizer.max_skipped_steps 2" in result.stderr
    assert "update skipped (3 in a row)" in result.stdout
    assert (folder.parent / "nan" / "checkpoints" / "step-1").is_dir()


def _wait_for(condition, process, timeout_s: float = 180.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"the run ended early: {process.stderr.read()[-3000:]}")
        assert time.monotonic() < deadline, "the run did not get there in time"
        time.sleep(0.05)


def _kill_one_engine(process) -> None:
    engines = [
        p for p in psutil.Process(process.pid).children(recursive=True) if "rollout.worker" in " ".join(p.cmdline())
    ]
    assert engines
    os.kill(engines[0].pid, signal.SIGKILL)


def test_two_servers_shared_by_two_replicas_train_the_same_policy(whole):
    """The samples are the embedded engines', so every step is; one server is killed on the way and comes back."""
    config, folder, _ = whole
    servers = ["rollout.mode=server", "rollout.num_servers=2", "run.name=servers", "eval.data="]
    process = runs.start("train", str(config), *servers)
    shared = folder.parent / "servers"
    try:
        _wait_for(lambda: any(s["stage"] == "rlvr" for s in runs.steps_of(shared)), process)
        cores = [p for p in psutil.Process(process.pid).children(recursive=True) if "EngineCore" in p.name()]
        assert len(cores) == 2
        cores[0].kill()
        output, errors = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            runs.kill(process)
    assert process.returncode == 0, output[-1000:] + errors[-3000:]
    assert "2 server(s)" in output and "digests verified" in output
    steps, expected = ([s for s in runs.steps_of(f) if s["stage"] != "sft"] for f in (shared, folder))
    assert [s["step"] for s in steps] == [s["step"] for s in expected]
    assert steps[-1]["rollout/engine_restarts"] >= 1
    for ours, theirs in zip(steps, expected, strict=True):
        same = {
            name: value
            for name, value in runs.numbers_of(theirs).items()
            if name != "event" and not name.startswith(("eval/", "rollout/mismatch", "rollout/engine_restarts"))
        }
        assert {name: ours[name] for name in same} == pytest.approx(same, rel=1e-5)
    assert not any(p.is_running() for p in cores)
