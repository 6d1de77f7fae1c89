"""Whole runs that sample from vLLM servers: the same steps as with embedded engines, and one step off-policy."""

from __future__ import annotations

import pytest

from megatron_reheat.model.checkpoint import read_state
from tests.e2e import runs

SHORT = ["run.steps=4", "eval.data="]
SERVERS = ["rollout.mode=server", *SHORT]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    return runs.write_recipe(runs.recipe(runs.make_model_folder(root / "model"), root), root / "recipe.yaml")


def test_two_servers_shared_by_two_replicas_train_the_same_policy(config):
    """The samples are the embedded engines', so every step is."""
    result = runs.reheat("train", str(config), "run.name=embedded", *SHORT)
    assert result.returncode == 0, result.stderr[-3000:]
    expected = trained_steps(config.parent / "embedded")

    result = runs.reheat("train", str(config), "run.name=servers", "rollout.num_servers=2", *SERVERS)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    assert "2 server(s)" in result.stdout and "digests verified" in result.stdout
    steps = trained_steps(config.parent / "servers")
    assert [s["step"] for s in steps] == [s["step"] for s in expected]
    for ours, theirs in zip(steps, expected, strict=True):
        same = {
            name: value
            for name, value in runs.numbers_of(theirs).items()
            if isinstance(value, float) and not name.startswith("rollout/mismatch")
        }
        assert ours["stage"] == theirs["stage"] and len(same) > 10
        assert {name: ours[name] for name in same} == pytest.approx(same, rel=1e-5)


def test_sampling_ahead_is_one_step_off_policy_and_loses_no_prompt(config):
    """The first RL step is on-policy, the others train on what the policy before them sampled, with the same seeds."""
    overlap = ["rollout.overlap=true", "rl.tis_cap=2.0", "parallel.data=1", "controller.action=none"]
    overlap += ["rl.entropy_coef=1.0"]  # a gradient even where no answer is right
    result = runs.reheat("train", str(config), "run.name=ahead", *overlap, *SERVERS)
    assert result.returncode == 0, result.stderr[-3000:]
    steps = trained_steps(config.parent / "ahead")
    assert [s["rollout/staleness"] for s in steps] == [0.0, 1.0, 1.0, 1.0]
    assert steps[0]["rollout/mismatch_kl"] < 1e-6
    # what the weights moved by in one update is what the two policies differ by
    assert all(1e-8 < s["rollout/mismatch_kl"] < 0.1 for s in steps[1:])
    # prompts that are sampled ahead count as drawn only when they are trained on
    drawn = {
        f.name: read_state(f)["cursor"]["position"] for f in (config.parent / "ahead" / "checkpoints").glob("step-*")
    }
    assert drawn == {"step-8": 12, "step-9": 18, "step-10": 24}


def trained_steps(folder):
    return [s for s in runs.steps_of(folder) if s["stage"] != "sft"]
