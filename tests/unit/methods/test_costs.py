"""What a method says a step costs beyond GRPO's, and what `reheat check` makes of it."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_reheat.cluster.estimate import Estimate
from megatron_reheat.cluster.preflight import check, make_estimate
from megatron_reheat.config import Config
from megatron_reheat.methods import choose_method
from megatron_reheat.methods.grpo import Costs
from megatron_reheat.recipe import load_config, parse_config

YAML = Path(__file__).resolve().parents[3] / "yaml" / "methods"
METHOD = """
from megatron_reheat.methods.grpo import GRPO, Costs
class Dear(GRPO):
    {samplers}
    @classmethod
    def costs(cls, config, options):
        return Costs({costs})
    @classmethod
    def hint(cls, options):
        return {hint!r}
"""


def recipe(folder: Path, costs: str, *, hint: str | None = None, samplers: bool = False, **sections: Any) -> Config:
    path = folder / f"dear_{len(list(folder.iterdir()))}.py"
    path.write_text(METHOD.format(costs=costs, hint=hint, samplers='samplers = ("explorer",)' * samplers))
    rl = {
        "method": f"{path}:Dear",
        "minibatch_prompts": 16,
        **({"samplers": {"explorer": "Qwen/Qwen3-1.7B-Base"}} if samplers else {}),
    }
    tree = {
        "model": {"hf_path": "Qwen/Qwen3-4B-Base", "recompute": "full"},
        "data": {"path": "-", "max_prompt_tokens": 1024, "max_hinted_prompt_tokens": 2000},
        "rollout": {"max_tokens": 8192},
        "rl": rl,
    }
    return parse_config({**tree, **{name: {**tree.get(name, {}), **keys} for name, keys in sections.items()}})


def estimate(config: Config) -> Estimate:
    return make_estimate(config, gpus=8, mean_tokens=1500)


@pytest.fixture
def plain(tmp_path: Path) -> Estimate:
    return estimate(recipe(tmp_path, ""))


@pytest.mark.parametrize("path", sorted(YAML.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipes_method_says_what_it_costs(path: Path) -> None:
    config = load_config(path)
    costs = dataclasses.asdict(choose_method(config).costs(config))
    frozen = costs.pop("frozen")
    assert frozen.keys() == config.rl.samplers.keys() and all(0 < share <= 1 for share in frozen.values())
    assert -1 < costs["sampled"] <= 1 and all(math.isfinite(share) for share in costs.values())
    assert all(share >= 0 for name, share in costs.items() if name != "sampled")
    if config.rl.method == "grpo":
        assert set(costs.values()) == {0.0}


def costs_of(name: str, *overrides: str) -> Costs:
    config = load_config(YAML / f"{name}.yaml", overrides)
    return choose_method(config).costs(config)


def test_scope_samples_some_prompts_again_and_trains_on_what_is_right() -> None:
    """One of 64 prompts, and half of its samples taken to be right; aepo's take the places of others."""
    assert costs_of("scope") == Costs(sampled=1 / 64, trained=1 / 128)
    assert costs_of("scope", "rl.options.alpha=0.001") == Costs(sampled=1 / 64, trained=1 / 128)
    assert costs_of("scope", "rl.options.variant=aepo") == Costs(sampled=1 / 4)


def test_teachers_read_while_they_have_a_say() -> None:
    """rlrt: half of the samples taken to be right; rlsd's teacher is not asked once lam is 0, after 50 of 400 steps."""
    assert costs_of("rlrt") == Costs(scored=0.5)
    assert costs_of("rlrt", "rl.options.decay_steps=100") == Costs(scored=0.5 * 99 / 400)
    assert costs_of("rlsd") == Costs(scored=49 / 400)
    assert costs_of("rlsd", "rl.options.decay_steps=800") == Costs(scored=1.0)
    assert costs_of("rlsd", "rl.options.lam=0") == Costs()


def test_sdpgs_teacher_reads_what_it_teaches() -> None:
    assert costs_of("sdpg") == Costs(read=0.5)
    assert costs_of("sdpg", "rl.options={beta: 0.02, gate: false}") == Costs(read=1.0)


def test_oisd_reads_a_second_vocabulary() -> None:
    assert costs_of("oisd", "rl.options.think_coef=1") == Costs(heads=1.0)
    assert costs_of("oisd", "rl.options.think_coef=0", "rl.options.attention_coef=0.1") == Costs()


def test_more_samples_take_another_rollout_of_so_many_prompts(tmp_path: Path, plain: Estimate) -> None:
    dear = estimate(recipe(tmp_path, "sampled=0.25"))
    more = dear.rollout_seconds(dataclasses.replace(plain.rl_batch, prompts=16))
    assert dear.rl_step() == {**plain.rl_step(), "rollout": pytest.approx(plain.rl_step()["rollout"] + more)}
    assert dear.reheat_step() == plain.reheat_step()


def test_more_sequences_are_scored_and_trained_on(tmp_path: Path, plain: Estimate) -> None:
    dear, before = estimate(recipe(tmp_path, "trained=0.5")), plain.rl_step()
    trained = 4 * plain.pass_seconds(plain.rl_batch, training=True)  # minibatches
    assert dear.rl_step() == {
        **before,
        "score": pytest.approx(1.5 * before["score"]),
        "update": pytest.approx(before["update"] + 0.5 * trained),
    }


@pytest.mark.parametrize(("hint", "prompt"), [(None, 256.0), ("sibling", 256.0 + 1500)])
def test_a_teacher_reads_longer_prompts(tmp_path: Path, plain: Estimate, hint: str | None, prompt: float) -> None:
    scores = estimate(recipe(tmp_path, "scored=0.5", hint=hint))
    reads = estimate(recipe(tmp_path, "read=1", hint=hint))
    assert scores.hinted_batch == dataclasses.replace(plain.rl_batch, prompt_tokens=pytest.approx(prompt))
    once = 4 * plain.pass_seconds(scores.hinted_batch, training=False)
    before = plain.rl_step()
    assert scores.rl_step() == {**before, "score": pytest.approx(before["score"] + 0.5 * once)}
    assert reads.rl_step() == {**before, "update": pytest.approx(before["update"] + once)}
    capped = estimate(recipe(tmp_path, "", hint=hint, data={"max_hinted_prompt_tokens": 200}))
    assert capped.hinted_batch.prompt_tokens == (200 if hint else 256)


def test_vocabularies_beside_the_policys_take_time_and_memory(tmp_path: Path, plain: Estimate) -> None:
    dear, read = estimate(recipe(tmp_path, "heads=1")), estimate(recipe(tmp_path, "read=0.1"))
    tokens = plain.rl_batch.tokens_per_block * 1500 / (1500 + 256)
    flops = 4 * tokens * 6 * 2560 * 151936
    assert dear.rl_step()["update"] - plain.rl_step()["update"] == pytest.approx(flops / (0.64 * 989e12))
    one = 4 * 1024 * 151936
    assert [e.head_bytes() for e in (plain, read, dear)] == [3 * one, 4 * one, 6 * one]


def test_where_frozen_models_take_over_the_policy_samples_less(tmp_path: Path, plain: Estimate) -> None:
    dear = estimate(recipe(tmp_path, "sampled=-0.375"))
    prompts = plain.rl_batch.prompts  # twice as many at once, and a margin (`rl.oversample`)
    asked = math.ceil(2 * (prompts + math.sqrt(prompts / 2)))
    smaller = dataclasses.replace(plain.rl_batch, prompts=asked, group_size=5)
    assert dear.rl_step() == {**plain.rl_step(), "rollout": pytest.approx(plain.rollout_seconds(smaller))}


def said(config: Config) -> str:
    out = io.StringIO()
    check(config, gpus=8, console=Console(file=out, width=200, highlight=False))
    (line,) = [line for line in out.getvalue().splitlines() if line.startswith("method ")]
    return line


def test_check_says_it_in_one_line(tmp_path: Path) -> None:
    config = recipe(tmp_path, "sampled=0.25, trained=1.5, scored=0.5")
    assert said(config) == (
        f"method {Path(config.rl.method).name}, beyond GRPO's step: 25% more completions sampled, 1.5x more sequences trained "
        "on, 50% of the sequences scored once more"
    )
    explored = recipe(tmp_path, "sampled=-0.1, frozen={'explorer': 0.1}", samplers=True, rollout={"mode": "colocated"})
    assert said(explored).partition(": ")[2] == (
        "10% fewer completions sampled of the policy, 10% sampled from explorer (Qwen/Qwen3-1.7B-Base)"
    )
    assert said(load_config(YAML.parent / "ts_opsd.yaml")) == "method grpo, beyond GRPO's step: nothing"
