"""Keys of other trainers: each translation leads to keys that there are, and the error of an unknown key tells it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_reheat.config_reference import rows, sections
from megatron_reheat.errors import ConfigError
from megatron_reheat.foreign_keys import PROJECTS, translations
from megatron_reheat.recipe import load_config

KNOWN = {row.key for name, section in sections().items() for row in rows(section, f"{name}.")}
KNOWN |= {row.key.replace("data.", "eval.data.", 1) for row in rows(sections()["data"], "data.")}


@pytest.mark.parametrize("project", PROJECTS)
def test_every_translation_is_a_key(project: str) -> None:
    for theirs, ours in PROJECTS[project].items():
        named = re.findall(r"\b[a-z]+\.[a-z_.]+[a-z0-9]\b", ours.partition("=path")[0])
        assert named and set(named) <= KNOWN, (theirs, ours)


@pytest.mark.parametrize("project", PROJECTS)
def test_no_key_of_ours_is_taken_for_a_foreign_one(project: str) -> None:
    assert not PROJECTS[project].keys() & (KNOWN - {"rollout.temperature"})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["actor_rollout_ref.rollout.n=8"],
            "actor_rollout_ref: unknown key; verl's actor_rollout_ref.rollout.n is rl.group_size",
        ),
        (
            ["data.train_batch_size=64"],
            "data.train_batch_size: unknown key; verl's data.train_batch_size is rl.prompts_per_step",
        ),
        (["num_generations=8"], "num_generations: unknown key; TRL's num_generations is rl.group_size here"),
        (["beta=0.1"], "TRL's beta is rl.kl_coef here"),
        (["grpo.num_prompts_per_step=8"], "NeMo-RL's grpo.num_prompts_per_step is rl.prompts_per_step here"),
        (["orchestrator.group_size=8"], "prime-rl's orchestrator.group_size is rl.group_size here"),
        (["rl.gruop_size=8"], "rl.gruop_size: unknown key; did you mean 'group_size'"),
    ],
)
def test_the_error_of_an_unknown_key_tells_it(tmp_path: Path, overrides: list[str], message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"model": {"hf_path": "m"}, "data": {"path": "d.jsonl"}}))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(recipe, overrides)


def test_a_whole_section_of_another_trainer() -> None:
    section: dict[str, Any] = {"actor": {"optim": {"lr": 1e-6}, "strategy": "fsdp"}, "rollout": {"n": 5}}
    assert translations("actor_rollout_ref", section) == [
        "verl's actor_rollout_ref.actor.optim.lr is optimizer.lr",
        "verl's actor_rollout_ref.rollout.n is rl.group_size",
    ]
