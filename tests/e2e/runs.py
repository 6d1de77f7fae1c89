"""Real runs of the command line on a tiny model: `reheat train` with real Megatron-Core and real vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from examples.countdown_cpu.make_model import make_model, make_tokenizer

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
STAGES = ["rlvr", "rlvr", "reheat", "reheat", "reheat", "rlvr", "rlvr"]  # of the 7 steps after the warm start


def make_model_folder(folder: Path, seed: int = 0) -> Path:
    make_model(seed, layers=2, width=32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def recipe(model: Path, root: Path) -> dict[str, Any]:
    return {
        "model": {"hf_path": str(model), "dtype": "float32"},
        "parallel": {"data": 2, "microbatch_tokens": 512},
        "data": {**COUNTDOWN, "size": 60, "seed": 1, "solution_template": "{expression}"},
        "reward": {"kind": "reasoning_gym", "workers": 1, "timeout_s": 20},
        "rollout": {"max_tokens": 8, "enforce_eager": True, "kv_cache_mb": 32, "threads": 1, "timeout_s": 120},
        "sft": {"steps": 6, "batch_size": 16, "warmup_steps": 2, "log_every": 2},
        "rl": {"prompts_per_step": 6, "group_size": 4, "dynamic_sampling": False},
        "optimizer": {"lr": 1e-3, "warmup_steps": 1},
        "reheat": {"lr": 1e-3, "prompts_per_step": 12, "max_tokens": 8},
        "controller": EVERY_STAGE,
        "checkpoint": {"every": 1, "keep": 3},
        "eval": {"data": {**COUNTDOWN, "size": 10, "seed": 2}, "num_samples": 2, "top_p": 1.0, "max_tokens": 8},
        "run": {"name": "run", "folder": str(root / "{name}"), "steps": 7},
    }


def write_recipe(tree: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


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
    """`torchrun --nproc_per_node 2 -m megatron_reheat ARGUMENTS`"""
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "megatron_reheat")
    return _finish(_start(*launcher, *arguments), arguments, LIMIT_S)


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return _start("megatron_reheat", *arguments, **environment)


def _start(module: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
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
