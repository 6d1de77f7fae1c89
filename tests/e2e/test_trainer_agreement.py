"""vLLM holds the trainer's own policy after every sync: greedy tokens and log-probabilities, at TP = 1, TP = 2 and PP = 2, in
virtual stages, too."""

from __future__ import annotations

import pytest

from tests.distributed.launch import launch
from tests.e2e import runs
from tests.tiny_models import save_tiny_model

LAYOUTS = [{"tensor": 2}, {"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}]


@pytest.mark.parametrize(("world_size", "layouts"), [(1, [{}]), (2, LAYOUTS)], ids=str)
def test_greedy_tokens_and_logprobs_equal_the_trainers(tmp_path, world_size, layouts):
    folder = save_tiny_model("qwen3_tied", tmp_path / "model")
    ranks = launch("sampler_agreement", world_size, tmp_path, folder=folder, log_folder=tmp_path, layouts=layouts)
    assert all(len(rank) == len(layouts) for rank in ranks)
    for of_layout in zip(*ranks, strict=True):
        for results in of_layout:
            assert [r["versions"] for r in results] == [{1}, {2}]
            for result in results:
                assert all(result["argmax_equal"])
                assert result["logprob_gap"] <= 1e-3
            assert results[0]["tokens"] != results[1]["tokens"]  # the second sync changed the policy
        # compared on a last stage at least once
        assert any(result["argmax_equal"] for results in of_layout for result in results)


@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_other_layouts_train_the_same_policy(tmp_path, layout):
    """An engine on each rank samples from the weights a TP=2 or PP=2 trainer exports; all agree on every sampled token. The
    second begins in virtual stages and goes on without."""
    folder = runs.make_policy_folder(tmp_path / "model", layers=4)
    config = runs.write_recipe(runs.recipe(folder, tmp_path), tmp_path / "recipe.yaml")
    other = ["parallel.data=1", f"parallel.{layout}=2", f"run.name={layout}", "run.steps=3", "eval.data="]
    other += ["rollout.mode=colocated", "rollout.verify_every=1"]
    if layout == "tensor":  # under a torchrun of the user's
        result = runs.torchrun("train", str(config), *other)
        assert result.returncode == 0, result.stderr[-3000:]
        output = result.stdout
    else:
        output = runs.train(config, *other, "parallel.virtual_pipeline=2", "run.steps=2")
        assert "x pipeline 2 (2 model chunks each) x" in output
        output = runs.train(config, *other)
    assert "2 engine(s)" in output
    steps = [s for s in runs.steps_of(tmp_path / layout) if s["stage"] != "sft"]
    assert [s["stage"] for s in steps] == runs.STAGES[:3]
    assert all(s["rollout/mismatch_abs_max"] <= 1e-3 for s in steps)
