"""`reheat check --layouts`: what fits is listed, the fastest first, and can be put into the recipe as it is printed."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from megatron_reheat.cli import main
from megatron_reheat.cluster.layouts import NEAR, Layout, layouts_that_fit
from megatron_reheat.cluster.preflight import gpu_called, make_estimate, require_fit
from megatron_reheat.config import Config
from megatron_reheat.recipe import load_config, parse_config

YAML = Path(__file__).resolve().parents[2] / "yaml"


def recipe(name: str = "qwen3_4b_ts_opsd", *overrides: str) -> Config:
    return load_config(YAML / f"{name}.yaml", overrides)


def way(layout: Layout) -> tuple[str, ...]:
    """The overrides that say where trainer and engines are."""
    return tuple(
        o
        for o in layout.overrides
        if o.startswith(("parallel.tensor", "parallel.pipeline", "rollout.mode", "rollout.tensor"))
    )


def test_layouts_fit_are_sorted_and_none_is_faster_than_the_first() -> None:
    config = recipe()
    found, tried = layouts_that_fit(config, 8, "h100-80g")
    assert 10 < len(found) < tried
    fastest = min(layout.step_s for layout in found)
    near = [layout for layout in found if layout.step_s <= NEAR * fastest]
    assert found[: len(near)] == near  # too close to tell: those that split the model least come first
    assert [layout.split for layout in near] == sorted(layout.split for layout in near) and near[0].split == 1
    assert [layout.step_s for layout in found[len(near) :]] == sorted(layout.step_s for layout in found[len(near) :])
    for layout in found:
        p = layout.estimate.config.parallel
        assert p.tensor * p.pipeline * layout.estimate.num_replicas == 8
        assert p.sequence_parallel == (p.tensor > 1) and layout.gib <= layout.estimate.gpu.memory_gib
    own = make_estimate(config, gpus=8)
    assert found[0].step_s < sum(own.rl_step().values())
    ways = [way(layout) for layout in found]
    assert len(set(ways)) == len(ways)  # each with the micro-batches, recomputation and share that suit it best


def test_a_small_gpu_needs_what_a_large_one_does_not() -> None:
    large, _ = layouts_that_fit(recipe(), 8, "h200-141g")
    small, _ = layouts_that_fit(recipe(), 8, "a100-40g")
    assert small and {way(layout) for layout in small} < {way(layout) for layout in large}
    assert small[0].split > 1 == large[0].split


def test_a_sequence_is_split_only_where_a_whole_one_fits_nowhere(tmp_path: Path) -> None:
    """On 16 GPUs one of 256k tokens; half as long, or on twice as many GPUs, it goes without."""
    shape = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=1 << 18, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    shape.save_pretrained(tmp_path)
    found = {}
    for gpus, tokens in ((16, 1 << 17), (16, 1 << 18), (32, 1 << 18)):
        config = parse_config(
            {
                "model": {"hf_path": str(tmp_path)},
                "data": {"path": "-", "max_prompt_tokens": 1024},
                "rollout": {"mode": "server", "servers": ["http://a:1"], "max_tokens": tokens - 1024},
                "parallel": {"microbatch_tokens": tokens},
            }
        )
        layouts, _ = layouts_that_fit(config, gpus, "a10g-24g")
        found[gpus, tokens] = {layout.estimate.config.parallel.context for layout in layouts}
    assert found == {(16, 1 << 17): {1}, (16, 1 << 18): {2}, (32, 1 << 18): {1}}


def test_servers_have_their_own_gpus() -> None:
    found, _ = layouts_that_fit(recipe("qwen3_4b_servers"), 8, "h100-80g")
    assert found and all(layout.estimate.config.rollout.mode == "server" for layout in found)


def test_virtual_stages_of_the_recipe_are_tried_with_and_without() -> None:
    found, tried = layouts_that_fit(
        recipe("qwen3_4b_ts_opsd", "parallel.pipeline=2", "parallel.virtual_pipeline=3"), 8, "h100-80g"
    )
    sizes = [(p.pipeline, p.virtual_pipeline) for p in (layout.estimate.config.parallel for layout in found)]
    assert tried == 2 * layouts_that_fit(recipe(), 8, "h100-80g")[1]
    assert {(1, 1), (2, 1), (2, 3), (4, 3)} <= set(sizes) and (1, 3) not in sizes


def test_what_is_printed_last_is_an_override_of_the_recipe_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(YAML / "qwen3_4b_ts_opsd.yaml"), "--gpus", "16", "--layouts"]) == 0
    out = capsys.readouterr().out
    assert "layouts fit" in out and "An RL step of the first takes" not in out  # the recipe's own is for 8
    overrides = out.splitlines()[-1].split()
    estimate = make_estimate(recipe("qwen3_4b_ts_opsd", *overrides), gpus=16)
    require_fit(estimate, "h100-80g")
    assert main(["check", str(YAML / "qwen3_4b_ts_opsd.yaml"), "--layouts"]) == 0
    out = capsys.readouterr().out
    assert "of the recipe's own layout 130: rollout" in out and "The first leaves the model whole" in out


# Megatron-Bridge trains Qwen3-8B whole on 16 H100s, at 52% of their FLOP/s on 4,096 tokens
SHORT = (
    "rollout.max_tokens=3072", "reheat.max_tokens=3072", "eval.max_tokens=3072", "rl.overlong_buffer=512", "parallel.data=",
)  # fmt: skip


def test_a_model_that_fits_stays_whole_with_the_optimizer_over_its_replicas() -> None:
    servers = ("rollout.mode=server", "rollout.num_servers=16")
    config = recipe("qwen3_8b_ts_opsd", *SHORT, *servers, "parallel.distributed_optimizer=false")
    found, _ = layouts_that_fit(config, 16, "h100-80g")
    parallel, recompute = found[0].estimate.config.parallel, found[0].estimate.config.model.recompute
    assert (parallel.tensor, parallel.pipeline, recompute) == (1, 1, "none") and parallel.distributed_optimizer
    assert parallel.microbatch_tokens == 4096
    passes = {
        layout.estimate.config.parallel.tensor: layout.estimate.pass_seconds(layout.estimate.rl_batch, training=True)
        for layout in found
        if layout.estimate.config.parallel.pipeline == 1
    }
    assert passes[1] < passes[2] < passes[4] < passes[8]


def test_why_a_model_is_split_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["check", str(YAML / "qwen3_8b_ts_opsd.yaml"), "--layouts"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "With the model whole a step takes" in out and "memory leaves it model.recompute=full" in out
    assert main([*command, "--gpu", "a100-40g"]) == 0
    assert (
        "With the model whole none fits: its weights, gradients and part of the optimizer take 57.2 of 39.4 GiB"
        in capsys.readouterr().out
    )


def test_vllms_share_follows_from_what_the_trainer_leaves() -> None:
    config = recipe()
    found, _ = layouts_that_fit(config, 8, "h100-80g")
    shares = {layout.estimate.config.rollout.gpu_memory_utilization: layout.gib for layout in found}
    assert config.rollout.gpu_memory_utilization < max(shares)
    tight, _ = layouts_that_fit(recipe("qwen3_4b_ts_opsd", "rollout.gpu_memory_utilization=0.9"), 8, "h100-80g")
    assert min(layout.estimate.config.rollout.gpu_memory_utilization for layout in tight) < 0.6
    assert all(gib <= 0.955 * 79.1 for share, gib in shares.items() if share != config.rollout.gpu_memory_utilization)
    fixed, _ = layouts_that_fit(recipe("qwen3_4b_ts_opsd", "rollout.kv_cache_mb=8192"), 8, "h100-80g")
    assert {layout.estimate.config.rollout.gpu_memory_utilization for layout in fixed} == {0.4}


@pytest.mark.parametrize(
    ("name", "gpus", "gpu"),
    [
        ("ts_opsd", 8, "h100-80g"),
        ("qwen3_0.6b_gsm8k", 1, "rtx3090-24g"),
        ("qwen3_1.7b_ts_opsd", 1, "h100-80g"),
        ("qwen3_4b_ts_opsd", 8, "h100-80g"),
        ("qwen3_4b_servers", 8, "h100-80g"),
        ("qwen3_8b_ts_opsd", 8, "h100-80g"),
    ],
)
def test_recipes_split_their_model_as_is_recommended(name: str, gpus: int, gpu: str) -> None:
    config = recipe(name)
    assert config.parallel.distributed_optimizer
    found, _ = layouts_that_fit(config, gpus, gpu)
    assert found[0].split == config.parallel.tensor * config.parallel.pipeline


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "h101"], "--gpu h101 is not known; use one of"),
        (["--gpus", "1", "--gpu", "rtx3090-24g"], "of 12 layouts fits 1 x rtx3090-24g; use more or larger GPUs"),
        (["rl.method=none_such"], "rl.method: there is no 'none_such'"),
    ],
)
def test_what_cannot_be_is_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [a for a in arguments if "=" in a]
    options = [a for a in arguments if "=" not in a]
    assert main(["check", str(YAML / "qwen3_4b_ts_opsd.yaml"), *overrides, *options, "--layouts"]) == 1
    assert said in capsys.readouterr().err


def test_kinds_of_gpus_by_name() -> None:
    assert gpu_called("h100-80g").memory_gib == pytest.approx(79.1)
