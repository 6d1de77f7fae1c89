"""The GPU recipes themselves, end to end on the CPU: everything they switch on is executed, only sizes are smaller.

A run here is a recipe of yaml/ as its base, with a tiny model, files in place of hub data sets, a few short responses, and
thresholds under which every stage comes within six steps. Whatever else the recipe says stays as it says.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from megatron_reheat.config import Config
from megatron_reheat.config_data import DataConfig
from megatron_reheat.model.checkpoint import read_state
from megatron_reheat.recipe import load_config
from tests.character_tokenizer import character_tokenizer
from tests.e2e import runs
from tests.e2e.policies import imitate

YAML = runs.ROOT / "yaml"
PROBLEMS = [(f"{a}+{b}=", str(a + b)) for a in range(10) for b in range(10)]
MAX_TOKENS = 12
SIZES: dict[str, Any] = {
    "parallel": {"microbatch_tokens": 1024},
    "rollout": {
        "max_tokens": MAX_TOKENS,
        "enforce_eager": True,
        "kv_cache_mb": 32,
        "threads": 1,
        "timeout_s": 200,
        "mismatch_limit": 0.2,  # a character model in bfloat16 is noisier than a real one
    },
    "reward": {"workers": 1},
    "rl": {"prompts_per_step": 8, "group_size": 4, "overlong_buffer": 4, "max_generation_batches": 3},
    "reheat": {"prompts_per_step": 12, "max_tokens": MAX_TOKENS - 2},
    "controller": {**runs.EVERY_STAGE, "max_reheat_steps": 1},
    "checkpoint": {"every": 3},
    "eval": {"max_tokens": MAX_TOKENS, "num_samples": 2},
    "optimizer": {"lr": 1e-4, "warmup_steps": 2},
}
STAGES = ["rlvr", "rlvr", "reheat", "reheat", "rlvr"]
# what the paper's recipe says, or the defaults it relies on
SWITCHES: dict[str, dict[str, Any]] = {
    "model": {"dtype": "bfloat16"},
    "parallel": {"distributed_optimizer": True},
    "reward": {"incorrect": -1.0, "sandbox": True},
    "rl": {"dynamic_sampling": True, "oversample": True, "normalize_by_std": True},
    "logging": {"console": True, "tensorboard": True},
    "data": {"template": "chat", "on_long_prompt": "skip"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipes")
    tokenizer = character_tokenizer()
    _model(load_config(YAML / "qwen3_4b_ts_opsd.yaml").data.system_prompt).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    return root


@cache
def _model(system_prompt: str) -> Qwen3ForCausalLM:
    """Answers in a box, most often rightly."""
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        pad_token_id=0, eos_token_id=1, rope_theta=10000.0,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    examples = [(_prompt(tokenizer, system_prompt, question), rf"\boxed{{{answer}}}") for question, answer in PROBLEMS]
    imitate(model, tokenizer, examples, steps=220, batch_size=16)
    return model


def _prompt(tokenizer: PreTrainedTokenizerBase, system_prompt: str, question: str) -> str:
    messages = [{"role": "system", "content": system_prompt}, {"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def shrunk(recipe: str, root: Path, name: str, **sections: dict[str, Any]) -> Path:
    """A recipe whose base is yaml/`recipe` and which changes sizes and places alone; `sections` come on top."""
    config = load_config(YAML / recipe)
    tree: dict[str, Any] = {"base": str(YAML / recipe), "model": {"hf_path": str(root / "model")}}
    for section, values in (*SIZES.items(), *sections.items()):
        tree[section] = {**tree.get(section, {}), **values}
    tree["data"] = _files_of(config.data, root / f"{name}-train.jsonl", PROBLEMS[:80])
    if config.eval.data is not None:
        tree["eval"]["data"] = _files_of(config.eval.data, root / f"{name}-eval.jsonl", PROBLEMS[80:90])
    tree["run"] = {"name": name, "folder": str(root / "{name}"), "steps": len(STAGES), **sections.get("run", {})}
    return runs.write_recipe(tree, root / f"{name}.yaml")


def _files_of(data: DataConfig, path: Path, problems: list[tuple[str, str]]) -> dict[str, Any]:
    """Records under the recipe's own keys, the last of them too long (`on_long_prompt`)."""
    records = []
    for question, answer in [*problems, ("1+" * 400, "400")]:
        record: dict[str, Any] = {}
        for key, value in ((data.prompt_key, question), (data.answer_key, answer)):
            *parents, leaf = key.split(".")
            node = record
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
        records.append(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"source": "files", "name": None, "path": str(path), "options": None, "max_prompt_tokens": 200}


def train(config: Path) -> list[dict[str, Any]]:
    output = runs.train(config)
    name = config.stem
    steps = runs.steps_of(config.parent / name)
    trained = [s for s in steps if s["step"] > 0]
    assert [s["step"] for s in trained] == list(range(1, load_config(config).run.steps + 1))
    assert "first weight sync" in output and any((config.parent / name / "tensorboard").iterdir())
    return steps


def check_what_every_recipe_does(config: Config, steps: list[dict[str, Any]], **switches: dict[str, Any]) -> None:
    """What the recipe switches on is on, and shows in what is measured."""
    for section, values in (*SWITCHES.items(), *switches.items()):
        assert {key: getattr(getattr(config, section), key) for key in values} == values
    rl = [s for s in steps if s["stage"] == "rlvr" and s["step"] > 0]
    for s in rl:
        assert 0 < s["rollout/mismatch_kl"] < 0.2 and s["optimizer/grad_norm"] > 0
        # the filter looks at correctness; what is thrown away still counts in the accuracy, at -1 for a wrong answer
        assert 0 < s["sampling/kept_fraction"] <= 1
        assert s["reward/mean"] == pytest.approx(2 * s["reward/accuracy"] - 1)
        assert s["entropy/trained"] != s["entropy/mean"]
    assert any(s["sampling/kept_fraction"] < 1 for s in rl)
    check_that_steps_draw_what_they_need(config.rl.prompts_per_step, rl)
    assert all(s["response/length_max"] <= MAX_TOKENS for s in rl)


def check_that_steps_draw_what_they_need(size: int, rl: list[dict[str, Any]]) -> None:
    """After the first step, the first generation batch is as large as the fraction of kept groups so far asks for."""
    kept = rl[0]["sampling/kept_fraction"]
    assert rl[0]["sampling/prompts"] == size * rl[0]["sampling/generation_batches"]
    for s in rl[1:]:
        first = min(math.ceil((size + math.sqrt(size * (1 - kept))) / kept), 4 * size)
        assert (
            s["sampling/prompts"] == first if s["sampling/generation_batches"] == 1 else s["sampling/prompts"] > first
        )
        kept = 0.7 * kept + 0.3 * s["sampling/kept_fraction"]


def stages_of(steps: list[dict[str, Any]]) -> list[str]:
    return [s["stage"] for s in steps if s["step"] > 0]


def test_the_4b_recipe_on_two_replicas_in_its_arm_with_the_reverse_divergence(root):
    path = shrunk("qwen3_4b_reverse_kl.yaml", root, "replicas", parallel={**SIZES["parallel"], "data": 2})
    config, steps = load_config(path), train(path)
    assert stages_of(steps) == STAGES
    check_what_every_recipe_does(
        config, steps, parallel={"sequence_parallel": False}, reheat={"direction": "reverse"}, eval={"top_p": 0.7}
    )
    evaluated = [s for s in steps if "eval/avg_at_k" in s]
    assert [s["step"] for s in evaluated] == [0, 2, 4, 5] and config.eval.data.on_long_prompt == "skip"
    # the policy answers in the box that the system prompt asks for
    assert evaluated[0]["eval/avg_at_k"] > 0
    assert read_state(root / "replicas" / "checkpoints" / f"step-{len(STAGES)}")["step"] == len(STAGES)


def test_the_base_recipe_on_two_tensor_ranks_in_sequence_parallel(root):
    parallel = {**SIZES["parallel"], "tensor": 2, "sequence_parallel": True}
    path = shrunk("ts_opsd.yaml", root, "tensor", parallel=parallel, rl={**SIZES["rl"], "minibatch_prompts": 4})
    config, steps = load_config(path), train(path)
    assert stages_of(steps) == STAGES
    check_what_every_recipe_does(config, steps, parallel={"sequence_parallel": True, "tensor": 2})


def test_the_8b_recipe_with_colocated_engines_through_all_its_rounds(root):
    """Its layout needs four ranks; with one replica the engines and the trainer still take turns on the same two."""
    controller = {**SIZES["controller"], "smoothing_steps": 1, "cooldown_steps": 1, "max_rounds": 2}
    path = shrunk(
        "qwen3_8b_ts_opsd.yaml", root, "colocated",
        parallel={**SIZES["parallel"], "data": 1}, controller=controller, run={"steps": 8},
    )  # fmt: skip
    config, steps = load_config(path), train(path)
    assert stages_of(steps) == ["rlvr", "reheat", "reheat", "rlvr", "reheat", "reheat", "rlvr", "rlvr"]
    assert [s["round"] for s in steps if s["step"] > 0] == [0, 1, 1, 1, 2, 2, 2, 2]
    check_what_every_recipe_does(config, steps, rollout={"mode": "colocated"}, parallel={"tensor": 2})


def test_the_arm_that_raises_the_sampling_temperature(root):
    path = shrunk("qwen3_4b_rollout_temperature.yaml", root, "hotter", parallel={**SIZES["parallel"], "data": 1})
    config, steps = load_config(path), train(path)
    assert stages_of(steps) == ["rlvr"] * len(STAGES)
    assert [s["rollout/temperature"] for s in steps if s["step"] > 0] == [1.0, 1.0, 1.2, 1.2, 1.2]
    check_what_every_recipe_does(config, steps, controller={"rollout_temperature": 1.2})


def test_the_recipe_with_servers_of_its_own(root):
    rollout = {**SIZES["rollout"], "num_servers": 1}
    path = shrunk("qwen3_4b_servers.yaml", root, "servers", parallel={**SIZES["parallel"], "data": 1}, rollout=rollout)
    config, steps = load_config(path), train(path)
    assert stages_of(steps) == STAGES
    check_what_every_recipe_does(config, steps, rollout={"mode": "server"})


def test_every_gpu_recipe_is_one_of_these_or_a_change_of_sizes():
    """What a further recipe sets differently must be a size, a place, or something that a run above executes."""
    sizes = {
        "run": {"name", "folder", "steps"}, "model": {"hf_path", "head_chunk_tokens"},
        "parallel": {"data", "microbatch_tokens"}, "rollout": {"gpu_memory_utilization", "max_tokens"},
        "data": {"size", "name", "options", "prompt_key", "answer_key", "max_prompt_tokens"}, "reward": {"workers"},
        "reheat": {"prompts_per_step", "direction", "max_tokens"}, "controller": {"action", "rollout_temperature"},
        "rl": {"prompts_per_step", "overlong_buffer"}, "eval": {"every", "data", "max_tokens"}, "checkpoint": {"every"},
    }  # fmt: skip
    executed = {"qwen3_4b_ts_opsd.yaml", "qwen3_8b_ts_opsd.yaml", "qwen3_4b_servers.yaml"}
    others = [path for path in sorted(YAML.glob("qwen3_*.yaml")) if path.name not in executed]
    assert len(others) > 10
    for path in others:
        own = yaml.safe_load(path.read_text())
        own.pop("base")
        if held_out := own.get("eval", {}).get("data"):
            assert set(held_out) <= sizes["data"], path.name
        for section, values in own.items():
            assert set(values) <= sizes.get(section, set()), (path.name, section)
