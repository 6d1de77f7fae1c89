"""Dynamic sampling on a policy that has collapsed: no group teaches anything, and the controller acts all the same."""

from __future__ import annotations

import signal
import statistics

import pytest

from megatron_reheat.model.checkpoint import read_state
from megatron_reheat.stop_request import REQUEUE_EXIT_CODE
from tests.e2e import runs

# the warm start teaches one wrong answer to every problem, so that all responses become copies that earn nothing
COPIES = [
    "data.solution_template=1+1+1+1", "sft.steps=200", "sft.lr=5e-3", "sft.log_every=100", "parallel.data=1", "eval.data=",
    "rl.dynamic_sampling=true", "rl.prompts_per_step=12", "rl.group_size=8", "controller.smoothing_steps=6",
    "controller.collapse_below=0.08", "controller.reheat_to=0.12", "controller.runaway_entropy=2",
    "controller.runaway_jump=1", "controller.max_reheat_steps=12", "reheat.lr=2e-3", "reheat.prompts_per_step=288",
    "checkpoint.every=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    return runs.write_recipe(runs.recipe(runs.make_model_folder(root / "model"), root), root / "recipe.yaml")


@pytest.fixture(scope="module")
def steps(config):
    output = runs.train(config, "run.name=collapsed", *COPIES, "rl.max_generation_batches=2", "run.steps=16")
    assert "collapsed, entering reheat round 1" in output and "reheated, back to RL" in output
    return [s for s in runs.steps_of(config.parent / "collapsed") if s["stage"] != "sft"]


def test_a_fully_collapsed_policy_is_reheated_although_no_group_is_trained_on(steps):
    rl = [s for s in steps if s["stage"] == "rlvr"]
    assert [s["stage"] for s in steps[:7]] == ["rlvr"] * 6 + ["reheat"]
    assert all(s["sampling/kept_fraction"] == 0 and s["sampling/generation_batches"] == 2 for s in rl)
    assert all(s["entropy/estimated"] == 1 and "policy/loss" not in s for s in rl)
    assert {s["policy_version"] for s in steps[:6]} == {200}  # nothing was learnt before the reheating
    last = [s for s in steps if s["stage"] == "reheat"][-1]
    assert last["entropy/mean"] > 0.12


def test_both_stages_read_the_same_entropy_off_the_same_weights(steps):
    """RL changes nothing here, so its steps measure again and again what the neighbouring reheating steps measure exactly."""
    reheat = [s["entropy/mean"] for s in steps if s["stage"] == "reheat"]
    before = [s["entropy/mean"] for s in steps[:6]]
    after = [s["entropy/mean"] for s in steps[6 + len(reheat) :]]
    for estimates, exact in ((before, reheat[0]), (after, reheat[-1])):
        assert len(estimates) >= 5
        # 64 responses a step in RL and 288 in reheating are drawn anew each time
        error = statistics.stdev(estimates) * (1 / len(estimates) + 64 / 288) ** 0.5
        assert statistics.mean(estimates) == pytest.approx(exact, abs=4 * error)
        assert error < 0.4 * exact


def test_what_was_thrown_away_can_be_looked_at(config, steps):
    assert (config.parent / "collapsed" / "rollouts" / f"step-{steps[0]['step']:06}.jsonl").stat().st_size > 0


def test_an_endless_search_for_groups_ends_on_notice_and_the_step_is_made_anew(config):
    """Two batches a step would fit between two looks at the notice; unlimited ones are looked at one by one."""
    folder = config.parent / "endless"
    arguments = ["train", str(config), "run.name=endless", *COPIES, "controller.action=none", "run.steps=100000"]
    arguments += ["rl.max_generation_batches=0"]
    process = runs.start(*arguments)
    try:
        runs.wait_for(lambda: any(s["stage"] == "rlvr" for s in runs.steps_of(folder)), process)
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=runs.LIMIT_S)
    finally:
        if process.poll() is None:
            runs.kill(process)
    assert process.returncode == REQUEUE_EXIT_CODE and "asked to stop after step" in output
    steps = runs.steps_of(folder)
    assert steps[-1]["sampling/generation_batches"] == 10  # none of ten in a row brought a group
    done = steps[-1]["step"]
    state = read_state(folder / "checkpoints" / f"step-{done}")
    # 12 of the 60 prompts a batch, and those of the abandoned step are drawn again
    assert state["step"] == done
    assert 60 * state["cursor"]["epoch"] + state["cursor"]["position"] == 120 * (done - 200)
