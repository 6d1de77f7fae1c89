"""A whole run that takes up what steps before had sampled too much of, and goes on with it after a restart."""

from __future__ import annotations

from megatron_reheat.model.checkpoint import read_state
from tests.e2e import runs

SETTINGS = ["run.name=stale", "run.steps=5", "sft.steps=0", "eval.data=", "parallel.data=1", "controller.action=none"]
SAMPLING = ["rl.dynamic_sampling=true", "rl.prompts_per_step=4", "rl.minibatch_prompts=", "checkpoint.keep=5"]
STALE = ["rl.max_staleness=1", "rl.tis_cap=2.0", "rl.max_generation_batches=0"]


def test_surplus_groups_are_trained_on_in_the_next_step_and_survive_a_restart(tmp_path):
    tree = runs.recipe(runs.make_policy_folder(tmp_path / "model"), tmp_path)
    recipe, folder = runs.write_recipe(tree, tmp_path / "recipe.yaml"), tmp_path / "stale"
    runs.train(recipe, *SETTINGS, *SAMPLING, *STALE)
    whole = {s["step"]: runs.numbers_of(s) for s in runs.steps_of(folder)}
    assert len(whole) == 5
    for step, s in whole.items():
        kept = read_state(folder / "checkpoints" / f"step-{step - 1}")["surplus"] if step > 1 else []
        assert s["policy_version"] == step  # every step has updated the policy
        fresh = [group for group in kept if step - 1 - group["completions"][0]["policy_version"] <= 1]
        assert s["sampling/reused_groups"] == min(len(fresh), 3)
        assert s["sampling/expired_groups"] == len(kept) - len(fresh)
        stale = s["sampling/reused_groups"] > 0
        assert (s["rollout/staleness"] > 0) == stale and s["rollout/staleness"] <= 1
        assert (s["rollout/mismatch_kl"] > 1e-6) == stale  # what the weights moved by since they were sampled
    resumed_from = max(step for step, s in whole.items() if s["sampling/reused_groups"]) - 1
    assert any(s["sampling/expired_groups"] for s in whole.values())

    latest = folder / "checkpoints" / "latest"
    latest.write_text(latest.read_text().replace("step-5", f"step-{resumed_from}"))
    runs.train(recipe, *SETTINGS, *SAMPLING, *STALE)
    again = {s["step"]: runs.numbers_of(s) for s in runs.steps_of(folder)}
    assert again == whole
