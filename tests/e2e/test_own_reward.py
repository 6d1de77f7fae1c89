"""The recipe with rewards of one's own on the recipe's mix of data, through RL and reheating on two ranks: what each function
says is on record, and how each part of the data and each suite fares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_reheat.recipe import load_config
from tests.e2e import runs

RECIPE = runs.ROOT / "yaml" / "countdown_cpu_own_reward.yaml"
MIX = runs.ROOT / "yaml" / "countdown_cpu_mix.yaml"


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
    mix = load_config(MIX)
    assert {name: part.weight for name, part in mix.data.mix.items()} == {"two_numbers": 1, "three_numbers": 3}
    parts = yaml.safe_load(MIX.read_text())
    data, suites = parts["data"], parts["eval"]["suites"]
    data["mix"]["two_numbers"]["size"], suites["two_numbers"]["size"] = 60, 12
    three = {**runs.COUNTDOWN["options"], "min_numbers": 3, "max_numbers": 3}
    data["mix"]["three_numbers"] |= {
        "source": "reasoning_gym",
        "name": "countdown",
        "size": 40,
        "options": three,
        "path": None,
    }
    tree = {**sizes, "base": str(RECIPE), "data": data, "run": {**sizes["run"], "steps": 4}}
    tree["eval"] |= {"suites": suites}
    tree["checkpoint"] |= {"keep_best": "eval/two_numbers/pass_at_k"}
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


def test_parts_of_the_mix_and_suites_are_on_record_by_name(folder: Path) -> None:
    steps = runs.steps_of(folder)
    sampled = [s for s in steps if s["stage"] == "rlvr" and s["step"]]
    for step in sampled:
        assert step["data/two_numbers/share"] + step["data/three_numbers/share"] == pytest.approx(1)
        parts = [
            step[f"data/{name}/share"] * step[f"data/{name}/accuracy"] for name in ("two_numbers", "three_numbers")
        ]
        assert sum(parts) == pytest.approx(step["reward/accuracy"])
    assert 0.15 < sum(s["data/two_numbers/share"] for s in sampled) / len(sampled) < 0.35
    evaluated = [s for s in steps if "eval/avg_at_k" in s]
    assert evaluated and all(s["eval/two_numbers/pass_at_k"] >= s["eval/two_numbers/avg_at_k"] for s in evaluated)
    assert any(s["eval/two_numbers/avg_at_k"] > 0 for s in evaluated)
    best = max(evaluated, key=lambda s: (s["eval/two_numbers/pass_at_k"], -s["step"]))
    assert (folder / "checkpoints" / "best").read_text() == f"step-{best['step']}"
    config = load_config(folder / "config.yaml")
    assert config.eval.samples_of("two_numbers") == 4 and config.data.mix["three_numbers"].weight == 3
