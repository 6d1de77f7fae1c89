"""A run whose ranks share every sequence, with an engine each; one rank that has them whole continues it."""

from __future__ import annotations

from megatron_reheat.recipe import load_config
from tests.e2e import runs


def test_two_context_ranks_train_through_every_stage_and_one_rank_goes_on(tmp_path):
    recipe = runs.recipe(runs.make_policy_folder(tmp_path / "model"), tmp_path)
    recipe["parallel"] = {"data": 1, "context": 2, "microbatch_tokens": 256}
    recipe["sft"] = {**recipe["sft"], "steps": 2}
    del recipe["eval"]
    config = runs.write_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_config(config).parallel.block == 2
    output = runs.train(config, "run.steps=3")
    assert "layout: tensor 1 x pipeline 1 x context 2 x data 1 on cpu" in output and "vLLM: 2 engine(s)" in output
    output = runs.train(config, "run.steps=4", "parallel.context=1")
    assert "layout: tensor 1 x pipeline 1 x data 1 on cpu" in output and "vLLM: 1 engine(s)" in output

    trained = [s for s in runs.steps_of(tmp_path / "run") if s["stage"] != "sft"]
    assert [s["step"] for s in trained] == [3, 4, 5, 6]
    assert [s["stage"] for s in trained] == runs.STAGES[:4]
    for s in trained:
        # both engines and the trainer compute the same policy, at every response token
        assert 0 < s["rollout/mismatch_kl"] < 1e-6
    assert all(s["optimizer/grad_norm"] > 0 for s in trained if s["stage"] == "rlvr")
    # the second minibatch is trained on by another policy than sampled it, the first by the same
    assert all(0 < s["policy/kl_to_old"] < 0.1 for s in trained if s["stage"] == "rlvr")
