"""The recipe with rewards of one's own, through RL and reheating on two ranks; what each function says is on record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_reheat.recipe import load_config
from tests.e2e import runs

RECIPE = runs.ROOT / "yaml" / "countdown_cpu_own_reward.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own")
    sizes = runs.recipe(runs.make_policy_folder(root / "model"), root)
    del sizes["reward"]
    reward = load_config(RECIPE).reward
    assert reward.kind == "function" and reward.sandbox and reward.function is not None
    assert {name.rpartition("examples/")[2]: weight for name, weight in reward.function.items()} == {
        "own_reward/rewards.py:closeness": 1.0,
        "own_reward/rewards.py:brevity": 0.1,
    }
    tree = {**sizes, "base": str(RECIPE), "run": {**sizes["run"], "steps": 4}}
    tree["sft"]["steps"] = 0
    tree["rl"] |= {"minibatch_prompts": None, "dynamic_sampling": True, "max_generation_batches": 4}
    runs.train(runs.write_recipe(tree, root / "recipe.yaml"))
    return root / "run"


def test_values_are_on_record_by_name_and_weighted(folder: Path) -> None:
    steps = [s for s in runs.steps_of(folder) if s["stage"] == "rlvr" and s["step"]]
    assert {"rlvr", "reheat"} == {s["stage"] for s in runs.steps_of(folder)}
    for step in steps:
        assert step["reward/mean"] == pytest.approx(step["reward/closeness"] + 0.1 * step["reward/brevity"], abs=1e-6)
        assert 0 <= step["reward/accuracy"] <= step["reward/closeness"] < 1
        # partial credit tells responses apart where right and wrong would not
        assert step["reward/uniform_group_fraction"] < 0.5 and step["sampling/kept_fraction"] > 0.5


def test_rollouts_show_them_too(folder: Path) -> None:
    rows = [
        json.loads(line) for file in sorted((folder / "rollouts").iterdir()) for line in file.read_text().splitlines()
    ]
    graded = [row for row in rows if row["reward"] is not None]
    assert graded and all(set(row["reward_parts"]) == {"closeness", "brevity"} for row in graded)
    assert all(row["correct"] == (row["reward_parts"]["closeness"] == 1.0) for row in graded)
