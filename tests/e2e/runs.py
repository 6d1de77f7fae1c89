"""Real runs of the command line on a tiny model: `reheat train` with real Megatron-Core and real vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import reasoning_gym
import yaml
from pyarrow import parquet
from transformers import PreTrainedModel

from examples.countdown_cpu.make_model import make_model, make_tokenizer
from megatron_reheat.cli import main
from megatron_reheat.config_data import DataConfig
from megatron_reheat.data.sources import read_records
from megatron_reheat.recipe import load_config
from tests.default_signals import hear_signals
from tests.e2e.policies import imitate
from tests.forks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 400.0  # for what takes half a minute on two idle cores: it only ends a run that hangs
COUNTDOWN = {
    "source": "reasoning_gym",
    "name": "countdown",
    "options": {
        "min_numbers": 2,
        "max_numbers": 2,
        "min_value": 1,
        "max_value": 9,
        "min_target": 1,
        "max_target": 81,
        "operators": ["+", "-", "*"],
    },
    "raw_template": "{target}|{numbers}=",
    "max_prompt_tokens": 12,
}
# thresholds that make every stage happen within a few steps, whatever the entropy
EVERY_STAGE = {
    "smoothing_steps": 2,
    "collapse_below": 90.0,
    "reheat_to": 95.0,
    "runaway_entropy": 99.0,
    "runaway_jump": 99.0,
    "max_reheat_steps": 2,
    "cooldown_steps": 50,
}
# makes of a message what COUNTDOWN's raw template makes of its fields
CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
STAGES = ["rlvr", "rlvr", "reheat", "reheat", "reheat", "rlvr", "rlvr"]  # of the 7 steps after the warm start


def make_model_folder(folder: Path, seed: int = 0) -> Path:
    return _save(make_model(seed, layers=2, width=32), folder)


def make_policy_folder(folder: Path, layers: int = 2) -> Path:
    """A policy that solves some of the problems, so that RL has a gradient."""
    return _save(_trained_model(layers), folder)


def _save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@cache
def _trained_model(layers: int) -> PreTrainedModel:
    problems = reasoning_gym.create_dataset("countdown", size=2000, seed=3, **COUNTDOWN["options"])
    examples = []
    for metadata in (problem["metadata"] for problem in problems):
        numbers, expression = ",".join(map(str, metadata["numbers"])), metadata["expression"]
        examples.append((f"{metadata['target']}|{numbers}=", expression))
    model = make_model(0, layers=layers, width=32)
    imitate(model, make_tokenizer(), examples, steps=120)
    return model


def recipe(model: Path, root: Path) -> dict[str, Any]:
    return {
        "model": {"hf_path": str(model), "dtype": "float32"},
        "parallel": {"data": 2, "microbatch_tokens": 512},
        "data": {**COUNTDOWN, "size": 60, "seed": 1, "solution_template": "{expression}"},
        "reward": {"kind": "reasoning_gym", "workers": 1, "timeout_s": 20},
        "rollout": {"max_tokens": 8, "enforce_eager": True, "kv_cache_mb": 32, "threads": 1, "timeout_s": 120},
        "sft": {"steps": 6, "batch_size": 16, "lr": 5e-4, "warmup_steps": 2, "log_every": 2},
        "rl": {"prompts_per_step": 6, "group_size": 4, "minibatch_prompts": 3, "dynamic_sampling": False},
        "optimizer": {"lr": 3e-4, "warmup_steps": 1},
        "reheat": {"lr": 3e-4, "prompts_per_step": 12, "max_tokens": 8},
        "controller": EVERY_STAGE,
        "checkpoint": {"every": 1, "keep": 3},
        "eval": {"data": {**COUNTDOWN, "size": 10, "seed": 2}, "num_samples": 2, "top_p": 1.0, "max_tokens": 8},
        "run": {"name": "run", "folder": str(root / "{name}"), "steps": 7},
    }


def conversational(tree: dict[str, Any], folder: Path, copies: int = 1) -> dict[str, Any]:
    """The same problems as messages in Parquet files of verl's schema, with the task's metadata beside them. A file holds
    `copies` of the training problems and two of the others; duplicates are left out."""
    keys = {
        "template": "chat", "prompt_key": "prompt", "answer_key": "reward_model.ground_truth",
        "solution_template": "{reward_model.ground_truth}", "max_prompt_tokens": 12, "on_long_prompt": "skip",
        "options": {"cache_dir": str(folder / "cache")},
    }  # fmt: skip
    train = {**keys, "path": str(folder / "train.parquet"), "deduplicate": copies > 1}
    held_out = {**keys, "path": [str(folder / "eval.parquet")], "deduplicate": True}
    for path, section, count in (
        (train["path"], tree["data"], copies),
        (held_out["path"][0], tree["eval"]["data"], 2),
    ):
        records = [_conversation(entry) for entry in read_records(DataConfig(**section))]
        parquet.write_table(pyarrow.Table.from_pylist(records * count), path)
    return {**tree, "data": train, "eval": {**tree["eval"], "data": held_out}}


def _conversation(entry: dict[str, Any]) -> dict[str, Any]:
    metadata = entry["metadata"]
    text = f"{metadata['target']}|{','.join(map(str, metadata['numbers']))}"
    return {
        "data_source": "countdown",
        "prompt": [{"role": "user", "content": text}],
        "ability": "MATH",
        "reward_model": {"ground_truth": metadata["expression"], "style": "rule"},
        "extra_info": {"index": str(metadata["source_index"])},
        **entry,
    }


def write_recipe(tree: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def train(recipe: Path, *overrides: str) -> str:
    """`reheat train RECIPE OVERRIDES` on ranks that are forks, which saves each of them its imports; fails when it does.

    For what does not depend on how ranks are started; `reheat` and `torchrun` start them as users do. Returns what the first
    rank printed.
    """
    config = load_config(recipe, overrides)
    ranks = config.parallel.block * config.data_parallel()
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["train", str(recipe), *overrides]
        run_ranks(_rank, arguments, world_size=ranks, logs=Path(folder), timeout_s=2 * LIMIT_S)
        return (Path(folder) / "log-0.txt").read_text()


def _rank(arguments: list[str]) -> None:
    os.chdir(ROOT)
    if status := main(arguments):
        sys.exit(status)


def reheat(*arguments: str, timeout_s: float = LIMIT_S, **environment: str) -> subprocess.CompletedProcess[str]:
    """`reheat ARGUMENTS` in a process group of its own, which is ended on timeout."""
    return _finish(start(*arguments, **environment), arguments, timeout_s)


def _finish(
    process: subprocess.Popen[str], arguments: Sequence[str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    return _finish(start_torchrun(*arguments), arguments, LIMIT_S)


def start_torchrun(*arguments: str) -> subprocess.Popen[str]:
    """`torchrun --nproc_per_node 2 -m megatron_reheat ARGUMENTS`"""
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "megatron_reheat")
    return start_python("-m", *launcher, *arguments)


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return start_python("-m", "megatron_reheat", *arguments, **environment)


def start_python(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # as in a terminal, even where pytest itself was started to ignore it
        preexec_fn=hear_signals,
    )


def kill(process: subprocess.Popen[str]) -> None:
    """What a node failure does: every process of the run is gone at once, and none is left holding its output open."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = LIMIT_S) -> None:
    """Returns once the condition holds; a run that ends before, or a timeout, fails the test."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"the run ended early: {process.stderr.read()[-3000:]}")
        assert time.monotonic() < deadline, "the run did not get there in time"
        time.sleep(0.05)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The step records of a run's metrics.jsonl, without those lines that hold an event only."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if "stage" in line]


def numbers_of(record: dict[str, Any]) -> dict[str, Any]:
    """A step record without what may differ between two runs of the same computation: seconds and rates."""
    skipped = ("time/", "throughput/")
    return {k: v for k, v in record.items() if not k.startswith(skipped)}
