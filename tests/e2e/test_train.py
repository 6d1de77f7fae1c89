"""Whole runs on two processes: every stage, killed and resumed, forked, rolled back."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from examples.countdown_cpu.make_model import make_tokenizer
from tests.e2e import runs

KEEP_BEST = "checkpoint.keep_best=eval/avg_at_k"
STOP = "*"  # ends a response because generation_config.json alone says so


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    model = runs.make_policy_folder(root / "model")
    stops = [1, *make_tokenizer().convert_tokens_to_ids([STOP])]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return root


@pytest.fixture(scope="module")
def whole(root):
    """One uninterrupted run through every stage; the others are compared with it."""
    recipe = runs.conversational(runs.recipe(root / "model", root), root)
    recipe["checkpoint"] = {**recipe["checkpoint"], "borders": True}
    # which a checkpoint in the middle of a round has to keep; other runs have the paper's
    recipe["reheat"] = {**recipe["reheat"], "teacher": "frozen"}
    recipe["logging"] = {"rollouts_per_step": 12}  # as many prompts as a reheating step has
    config = runs.write_recipe(recipe, root / "whole.yaml")
    result = runs.reheat("train", str(config), "run.name=whole", KEEP_BEST)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return config, root / "whole", result


def border(run: Path, side: str) -> dict[str, Tensor]:
    """The weights on one side of the first round."""
    return load_file(run / "borders" / f"round-1-{side}" / "model.safetensors")


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
    rl = [s for s in trained if s["stage"] == "rlvr"]
    assert all(0 < s["reward/accuracy"] < 1 and s["optimizer/grad_norm"] > 0 for s in rl)
    assert all(
        s["policy/kl_to_old"] > 0 for s in rl
    )  # the second minibatch is trained on by another policy than sampled it
    events = [s["event"] for s in trained if "event" in s]
    assert len(events) == 2 and "entering reheat round 1" in events[0] and "reheating steps done" in events[1]
    evaluated = [s["step"] for s in steps if "eval/pass_at_k" in s]
    assert evaluated == [6, 8, 11, 13]  # warm start, collapse, reheated, end
    assert all(s["eval/pass_at_k"] >= s["eval/avg_at_k"] >= 0 for s in steps if "eval/pass_at_k" in s)


def test_responses_end_at_the_stop_tokens_of_generation_config(whole):
    files = sorted((whole[1] / "rollouts").glob("*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert {row["step"] for row in rows} == set(range(7, 14))
    # the products that the policy was taught end before their sign, which as a stop token is not a part of the text
    assert not any(STOP in row["response"] for row in rows)
    stopped = [row for row in rows if re.fullmatch(r"\d\s*", row["response"])]
    assert len(stopped) > 3
    assert {row["finish_reason"] for row in stopped} == {"stop"} and max(row["num_tokens"] for row in stopped) < 8


def test_prompts_are_messages_in_the_chat_template(whole):
    _, folder, result = whole
    prompts = [
        json.loads(line)["prompt"] for line in (folder / "rollouts" / "step-000007.jsonl").read_text().splitlines()
    ]
    assert prompts and all(re.fullmatch(r"\d+\|\d,\d=", prompt) for prompt in prompts)
    assert "data: 60 prompts of 60 records; 8 are duplicates (data.deduplicate=true leaves them out)" in result.stdout
    assert re.search(r"eval\.data: \d prompts of 20 records; 1\d duplicates left out", result.stdout)


def test_reheating_raises_and_sft_lowers_what_they_should(whole):
    steps = runs.steps_of(whole[1])
    losses = [s["sft/loss"] for s in steps if "sft/loss" in s]
    assert losses[-1] < losses[0]
    # evaluations draw from the same streams each time, and at both borders of the reheating
    before, after = (s["eval/entropy"] for s in steps if s["step"] in (8, 11))
    assert after > before


def test_run_folder_is_complete_and_the_terminal_is_readable(whole):
    _, folder, result = whole
    assert (folder / "config.yaml").is_file() and any((folder / "tensorboard").iterdir())
    assert (folder / "rollouts" / "step-000007.jsonl").is_file()
    for log in (folder / "logs").glob("vllm-*.log"):
        assert "vLLM was imported before the run asked for an engine" in log.read_text()  # else it was started twice
    accuracies = {s["step"]: s["eval/avg_at_k"] for s in runs.steps_of(folder) if "eval/avg_at_k" in s}
    best = max(accuracies, key=lambda step: accuracies[step])  # the first of equals
    assert (folder / "checkpoints" / "best").read_text() == f"step-{best}"
    assert {p.name for p in (folder / "checkpoints").glob("step-*")} == {f"step-{s}" for s in (best, 11, 12, 13)}
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        assert (checkpoint / "config.yaml").read_bytes() == (folder / "config.yaml").read_bytes()
        model = {path.name: path.read_bytes() for path in (checkpoint / "hf").iterdir()}
        assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= model.keys()
        assert all((whole[0].parent / "model" / name).read_bytes() == content for name, content in model.items())
    lines = result.stdout.splitlines()
    assert sum(bool(re.match(r"(rlvr|reheat)\s+\d+/13", line)) for line in lines) == 7
    assert any("ready" in line and "first weight sync" in line for line in lines)
    assert any("references: 0 of" in line for line in lines)
    assert "\x1b[" not in result.stdout and "Traceback" not in result.stderr


def test_the_policy_is_kept_on_either_side_of_the_round(whole):
    """What the microscope reads off it is what the run itself measured on the same responses."""
    _, folder, _ = whole
    last = [s for s in runs.steps_of(folder) if s["stage"] == "reheat"][-1]
    result = runs.reheat("compare", str(folder), "--data", str(folder / "rollouts" / f"step-{last['step']:06}.jsonl"))
    assert result.returncode == 0, result.stderr
    found = json.loads((folder / "report" / "round-1" / "compare.json").read_text())
    means = found["tokens"]["all"]
    assert (
        means["entropy_b"] == pytest.approx(last["entropy/mean"], rel=1e-3) and means["entropy_b"] > means["entropy_a"]
    )
    assert found["num_sequences"] == 12 and means["kl_ab"] > 0
    assert {block["block"]: block["moved"] for block in found["displacement"]}["all"] > 0


def test_a_report_is_drawn_from_it(whole):
    _, folder, _ = whole
    result = runs.reheat("report", str(folder))
    assert result.returncode == 0, result.stderr
    assert "What the rounds of whole changed" in (folder / "report" / "report.html").read_text()


def test_nothing_is_done_twice_when_a_finished_run_is_started_again(whole):
    config, folder, _ = whole
    before = runs.steps_of(folder)
    assert "nothing to do" in runs.train(config, "run.name=whole", KEEP_BEST)
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
    runs.train(config, "run.name=killed", KEEP_BEST)
    expected, actual = runs.steps_of(folder), runs.steps_of(killed)
    assert done < len(expected)
    assert [runs.numbers_of(s) for s in actual] == [runs.numbers_of(s) for s in expected]
    assert (killed / "checkpoints" / "best").read_text() == (folder / "checkpoints" / "best").read_text()
    for side in ("before", "after"):
        weights = [run / "borders" / f"round-1-{side}" / "model.safetensors" for run in (killed, folder)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_round_that_goes_on_after_its_first_update_has_the_teacher_with_which_it_began(whole):
    config, folder, _ = whole
    cut = folder.parent / "cut"
    runs.train(config, "run.name=cut", "run.steps=3")
    last = runs.steps_of(cut)[-1]
    assert (last["step"], last["stage"]) == (9, "reheat") and "event" not in last
    runs.train(config, "run.name=cut")
    assert [s["stage"] for s in runs.steps_of(cut) if s["stage"] != "sft"] == runs.STAGES
    after, expected = border(cut, "after"), border(folder, "after")
    assert after.keys() == expected.keys() and all(torch.equal(after[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def trunk(whole):
    """The same run, told to stop at its collapse."""
    config, folder, _ = whole
    assert "collapsed, stopping" in runs.train(config, "run.name=trunk", "controller.action=stop")
    return folder.parent / "trunk"


@pytest.fixture(scope="module")
def arm(whole, trunk):
    """Reheating from the trunk, with settings under which it runs away."""
    config, folder, _ = whole
    # any rise of the entropy counts as a jump, so the first reheating step's update is taken back by the second
    jumpy = ["controller.runaway_jump=1e-12", "reheat.lr=1e-2", "run.steps=4"]
    runs.train(config, "run.name=arm", f"run.fork_from={trunk}", *jumpy)
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
    before, after = (border(trunk.parent / "arm", side) for side in ("before", "after"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_arm_that_is_flattened_goes_on_from_the_entropy_that_was_asked_for(whole, trunk):
    config, folder, _ = whole
    before = runs.steps_of(trunk)[-1]["entropy/mean"]
    target = (before + 3.0) / 2  # ln 22 would be all characters alike
    goal = [f"controller.collapse_below={0.99 * target}", f"controller.reheat_to={target}", "run.steps=4"]
    output = runs.train(config, "run.name=flat", f"run.fork_from={trunk}", "controller.action=flatten", *goal)
    first, second = runs.steps_of(folder.parent / "flat")
    assert "collapsed, flattened at temperature" in first["event"] and first["event"] in " ".join(output.split())
    assert 1 < first["flatten/temperature"] < 4 and first["flatten/entropy"] == pytest.approx(target, rel=0.006)
    assert (first["stage"], second["stage"]) == ("rlvr", "rlvr") and first["entropy/mean"] < 0.95 * target
    # of responses of its own, which are few here
    assert second["entropy/mean"] == pytest.approx(target, rel=0.15)
    assert second["policy_version"] == first["policy_version"] + 1 == runs.steps_of(trunk)[-1]["policy_version"] + 3
    assert first["eval/entropy"] > 1.1 * runs.steps_of(trunk)[-1]["eval/entropy"]  # the border is evaluated
    before, after = (border(folder.parent / "flat", side) for side in ("before", "after"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.norm.weight"}
    scaled = after["model.norm.weight"] * first["flatten/temperature"]
    torch.testing.assert_close(scaled, before["model.norm.weight"], rtol=1e-5, atol=0)
