"""Every recipe that ships loads and survives a dump."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_reheat.methods import choose_method
from megatron_reheat.recipe import dump_config, load_config

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted([*(ROOT / "yaml").rglob("*.yaml"), *(ROOT / "examples").rglob("*.yaml")])


def test_there_are_recipes() -> None:
    assert {"countdown_cpu.yaml", "ts_opsd.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_loads(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    choose_method(config)
    dump = tmp_path / "config.yaml"
    dump.write_text(dump_config(config))
    assert load_config(dump) == config


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value in b} wherever two dumped configurations differ."""
    found: dict[str, Any] = {}
    for key in a.keys() | b.keys():
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found |= differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found[prefix + key] = right
    return found


@pytest.mark.parametrize("size", ["4b", "8b"])
def test_the_papers_hyperparameters(size: str) -> None:
    """arXiv 2606.00755, training details; the evaluation is 8 samples at T = 1.0, top-p 0.7, 8192 tokens."""
    c = load_config(ROOT / "yaml" / f"qwen3_{size}_ts_opsd.yaml")
    assert (c.model.hf_path, c.model.dtype) == (f"Qwen/Qwen3-{size.upper()}-Base", "bfloat16")
    assert (c.optimizer.lr, c.optimizer.warmup_steps, c.optimizer.weight_decay, c.optimizer.grad_clip) == (
        2e-6,
        10,
        0.1,
        1,
    )
    assert (c.rl.prompts_per_step, c.rl.group_size, c.rl.minibatch_prompts) == (64, 8, None)
    assert (c.rl.clip_low, c.rl.clip_high, c.rl.dual_clip) == (0.2, 0.28, 10.0)
    assert (c.rl.aggregation, c.rl.entropy_coef, c.rl.tis_cap) == ("token_mean", 0.0, None)
    assert (c.rollout.temperature, c.rollout.max_tokens, c.rl.overlong_buffer) == (1.0, 8192, 1024)
    assert (c.reheat.teacher_temperature, c.reheat.direction, c.reheat.lr) == (1.2, "forward", 1e-6)
    assert (c.reheat.prompts_per_step * c.reheat.group_size, c.reheat.max_tokens) == (1024, 4096)
    assert (c.reheat.weight_decay, c.controller.max_reheat_steps) == (0.0, 15)
    assert (c.controller.action, c.controller.collapse_below, c.controller.reheat_to) == ("reheat", 0.08, 0.12)
    assert (c.eval.num_samples, c.eval.temperature, c.eval.top_p, c.eval.max_tokens) == (8, 1.0, 0.7, 8192)
    assert c.data_parallel(8) == {"4b": 8, "8b": 4}[size]


@pytest.mark.parametrize("size", ["4b", "8b"])
@pytest.mark.parametrize(
    ("arm", "changes"),
    [
        ("trunk", {"controller.action": "stop"}),
        ("control", {"controller.action": "none"}),
        ("reverse_kl", {"reheat.direction": "reverse"}),
        ("rollout_temperature", {"controller.action": "rollout_temperature"}),
        ("data_scarce", {"data.size": 2048}),
        ("data_scarce_control", {"data.size": 2048, "controller.action": "none"}),
    ],
)
def test_an_arm_changes_nothing_else(size: str, arm: str, changes: dict[str, Any]) -> None:
    main, other = (load_config(ROOT / "yaml" / f"qwen3_{size}_{name}.yaml") for name in ("ts_opsd", arm))
    assert differences(main.model_dump(), other.model_dump()) == {**changes, "run.name": arm}


@pytest.mark.parametrize(("size", "tensor"), [("4b", 1), ("8b", 2)])
@pytest.mark.parametrize("nodes", [2, 4])
def test_more_nodes_change_only_the_replicas(size: str, tensor: int, nodes: int) -> None:
    main, other = (load_config(ROOT / "yaml" / f"qwen3_{size}_{name}.yaml") for name in ("ts_opsd", f"{nodes}nodes"))
    changed = {"parallel.data": 8 * nodes // tensor, "run.name": f"ts_opsd_{nodes}nodes"}
    assert differences(main.model_dump(), other.model_dump()) == changed
    assert other.data_parallel(8 * nodes) == 8 * nodes // tensor


def test_servers_change_only_the_rollout() -> None:
    main, other = (load_config(ROOT / "yaml" / f"qwen3_4b_{name}.yaml") for name in ("ts_opsd", "servers"))
    assert differences(main.model_dump(), other.model_dump()) == {
        "rollout.mode": "server",
        "rollout.num_servers": 8,
        "rollout.gpu_memory_utilization": 0.9,
        "run.name": "ts_opsd_servers",
    }
