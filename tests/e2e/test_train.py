"""Whole runs on two processes: every stage, killed and resumed, forked, rolled back."""

from __future__ import annotations

import math
import re

import pytest

from tests.e2e import runs

KEEP_BEST = "checkpoint.keep_best=eval/avg_at_k"


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
    assert [s["stage"] for s in trained] == runs.STAGES
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
        runs.wait_for(lambda: any(s["stage"] == "reheat" for s in runs.steps_of(killed)), process)
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


@pytest.fixture(scope="module")
def arm(whole, trunk):
    """Reheating from the trunk, with settings under which it runs away."""
    config, folder, _ = whole
    # any rise of the entropy counts as a jump, so the first reheating step's update is taken back by the second
    jumpy = ["controller.runaway_jump=1e-12", "reheat.lr=1e-2", "run.steps=4"]
    result = runs.reheat("train", str(config), "run.name=arm", f"run.fork_from={trunk}", *jumpy)
    assert result.returncode == 0, result.stderr[-3000:]
    return runs.steps_of(folder.parent / "arm")


def test_an_arm_goes_on_where_its_trunk_stopped(whole, trunk, arm):
    assert runs.steps_of(trunk)[-1]["step"] == 8
    assert [(s["step"], s["stage"]) for s in arm] == [(9, "reheat"), (10, "reheat")]
    # the same weights, seeds and data as the run that never stopped; both are measured before the step's update
    expected = next(s for s in runs.steps_of(whole[1]) if s["step"] == 9)
    assert arm[0]["entropy/mean"] == expected["entropy/mean"] and arm[0]["reheat/kl"] == expected["reheat/kl"]


def test_a_runaway_is_rolled_back_to_the_last_good_weights(trunk, arm):
    assert "ran away" in arm[1]["event"] and arm[1]["entropy/mean"] > arm[0]["entropy/mean"]
    # the evaluation at the border sees the trunk's weights again, bit for bit, under a new version
    collapsed = runs.steps_of(trunk)[-1]
    for name in ("eval/avg_at_k", "eval/pass_at_k", "eval/entropy"):
        assert arm[1][name] == collapsed[name]
    assert arm[1]["policy_version"] == collapsed["policy_version"] + 2
