"""The recipes of yaml/methods at the size of a test: the tiny policy on problems of two numbers, a few responses a step."""

from __future__ import annotations

import copy
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from examples.countdown_cpu.make_model import make_model, make_tokenizer
from examples.countdown_cpu.make_task import make_problem
from examples.elsewhere import moved
from examples.entropy_arena.recipes import RECIPES
from megatron_reheat.config import Config
from megatron_reheat.methods import METHODS
from megatron_reheat.recipe import dump_config, load_config
from tests.e2e import runs
from tests.e2e.policies import imitate

SIZES: dict[str, Any] = {
    "parallel": {"data": 1, "microbatch_tokens": 256},
    "rollout": {"max_tokens": 8, "kv_cache_mb": 32, "timeout_s": 120},
    "reward": {"timeout_s": 20},
    "sft": {"steps": 0},
    "rl": {"prompts_per_step": 8, "group_size": 4},
    "optimizer": {"lr": 3e-4, "warmup_steps": 1},
    "reheat": {"lr": 3e-4, "prompts_per_step": 8, "max_tokens": 8},
    "controller": {**runs.EVERY_STAGE, "action": "reheat", "max_reheat_steps": 1},
    "checkpoint": {"every": 1, "keep": 9},
    "logging": {"console": False, "tensorboard": False, "rollouts_per_step": 0},
    "eval": {"data": None},
}
# schedules as long as such a run, and a target that such a policy is below
OPTIONS: dict[str, dict[str, Any]] = {
    "s2l_po": {"mix_steps": 4},
    "rlsd": {"decay_steps": 4},
    "sdpg": {"warmup_steps": 1, "decay_steps": 3},
    "adaptive_entropy": {"target": 1.5},
}
# room for a solution behind the shorter half of the prompts; a sampled one is written with spaces
MAX_HINTED = {"rlrt": 18, "rlsd": 16, "sdpg": 18}
STAGES = ["rlvr", "rlvr", "reheat", "reheat", "rlvr"]


def make_inputs(root: Path) -> None:
    """What the recipes read, under the names that they read it by."""
    for name, model in {"model": _policy(), "explorer": _another(_policy())}.items():
        model.save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    (root / "task").mkdir()
    problems = _problems(seed=1, count=60)
    (root / "task" / "train.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))


@cache
def _policy() -> PreTrainedModel:
    """As deep as the demo's, and right about half of the time."""
    examples = []
    for problem in _problems(seed=2, count=2000):
        metadata = problem["metadata"]
        examples.append((f"{metadata['target']}|{','.join(map(str, metadata['numbers']))}=", problem["answer"]))
    model = make_model(0, width=32)
    imitate(model, make_tokenizer(), examples, steps=120)
    return model


def _another(policy: PreTrainedModel) -> PreTrainedModel:
    """One that writes like the policy, but not quite."""
    explorer, generator = copy.deepcopy(policy), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in explorer.parameters():
            weight.mul_(1 + 0.05 * torch.randn(weight.shape, generator=generator))
    return explorer


def _problems(seed: int, count: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [make_problem(2, rng) for _ in range(count)]


def small(name: str, root: Path, out: Path, **sections: dict[str, Any]) -> Path:
    """Writes the recipe into `out`, for the inputs in `root`; what it says of the method stays as it says."""
    run = {"run": {"name": name, "folder": str(out / "{name}"), "steps": len(STAGES)}}
    minibatch = load(name).rl.minibatch_prompts and SIZES["rl"]["prompts_per_step"] // 2
    method = {"rl": {"minibatch_prompts": minibatch, "options": OPTIONS.get(name, {})}}
    teacher = {"max_hinted_prompt_tokens": MAX_HINTED[name], "on_long_prompt": "skip"} if name in MAX_HINTED else {}
    config = moved(RECIPES[name], root, SIZES, method, {"data": teacher}, run, sections)
    path = out / f"{name}.yaml"
    path.write_text(dump_config(config))
    return path


def methods_without_recipe() -> set[str]:
    return set(METHODS) - {load(name).rl.method for name in RECIPES}


@cache
def load(name: str) -> Config:
    return load_config(RECIPES[name])
