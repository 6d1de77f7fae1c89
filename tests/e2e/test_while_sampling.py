"""A whole run that grades beside its engines: the steps and the rollouts of one that grades after them, to the bit."""

from __future__ import annotations

from tests.e2e import runs

SHORT = ["run.steps=3", "sft.steps=0", "eval.data=", "controller.action=none", "rl.dynamic_sampling=true"]
ALL = ["logging.rollouts_per_step=100", "rl.max_generation_batches=2", "checkpoint.every=0"]


def test_grading_beside_the_engines_changes_nothing_but_the_time(tmp_path):
    tree = runs.recipe(runs.make_policy_folder(tmp_path / "model"), tmp_path)
    recipe = runs.write_recipe(tree, tmp_path / "recipe.yaml")
    steps, rollouts = {}, {}
    for switch in ("reward.while_sampling=true", "reward.while_sampling=false"):
        form = switch.rpartition("=")[2]
        runs.train(recipe, f"run.name={form}", switch, *SHORT, *ALL)
        steps[form] = [runs.numbers_of(record) for record in runs.steps_of(tmp_path / form)]
        rollouts[form] = {path.name: path.read_bytes() for path in (tmp_path / form / "rollouts").iterdir()}
    assert len(steps["true"]) == 3 and steps["true"] == steps["false"]
    assert any(step["reward/accuracy"] > 0 for step in steps["true"])
    assert rollouts["true"] and rollouts["true"] == rollouts["false"]
