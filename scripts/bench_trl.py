"""A step of GRPO on the countdown demo, end to end, beside TRL's on the same machine.

    python -m scripts.bench_trl [--rounds 3] [--steps 20] [--layers 3 --width 96] [--max-tokens 16] [--only ours trl]

`pip install --no-deps trl accelerate` first.

Two processes of one thread each for every side, the same warm start, prompts, group size and loss, a learning rate of
almost nothing: all sample and train the same policy. A round runs each side once, one after the other; a run's step is the
median after the first few, and a ratio is that of one round. TRL samples with its own generation, and with vLLM in colocate
mode as far as that runs on a CPU (`trl_grpo`), in float32 as it trains, and in bfloat16, which is what it takes if nobody says
otherwise. "First step" is from the command to the end of the first step.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from megatron_reheat.run_folder import read_metrics
from scripts.bench_methods import make_policy

RECIPE = "yaml/countdown_cpu.yaml"
PROCESSES = 2
WARM_UP_STEPS = 5
OURS = "ours"


class Work(NamedTuple):
    """What every side does in a step."""

    folder: Path
    steps: int
    prompts: int
    group_size: int
    max_tokens: int


class Taken(NamedTuple):
    """Of one run: seconds to the end of the first step and of a step after that, and response tokens a sequence."""

    first_s: float
    step_s: float
    length: float


def ours(work: Work) -> Taken:
    run = work.folder / f"ours-{time.monotonic_ns()}"
    overrides = {
        "model.hf_path": work.folder / "model", "data.path": work.folder / "task" / "train.jsonl", "sft.steps": 0,
        "eval.data": "", "controller.action": "none", "run.name": "ours", "run.folder": run, "run.steps": work.steps,
        "optimizer.lr": 1e-12, "rl.prompts_per_step": work.prompts, "rl.group_size": work.group_size,
        "rollout.max_tokens": work.max_tokens, "logging.console": "false", "logging.rollouts_per_step": 0,
    }  # fmt: skip
    began = time.time()
    pairs = [f"{key}={value}" for key, value in overrides.items()]
    execute(["-m", "megatron_reheat", "train", RECIPE, *pairs], {})
    records = [r for r in read_metrics(run) if r.get("stage") == "rlvr"]
    counted = records[WARM_UP_STEPS:]
    # from step to step, so that what lies between two steps counts, too
    ends = [r["time/unix_s"] for r in records]
    return Taken(ends[0] - began, median_gap(ends), statistics.fmean(r["response/length_mean"] for r in counted))


def trl(work: Work, *, vllm: str | None = None) -> Taken:
    out = work.folder / f"trl-{time.monotonic_ns()}.json"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(PROCESSES), "-m", "scripts.trl_grpo"]
    options = {
        "--out": out, "--steps": work.steps, "--prompts": work.prompts, "--group-size": work.group_size,
        "--max-tokens": work.max_tokens,
    }  # fmt: skip
    flags = [str(part) for pair in options.items() for part in pair] + (["--vllm", vllm] if vllm else [])
    began = time.time()
    execute([*launcher, str(work.folder), *flags], {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"})
    found = json.loads(out.read_text())
    return Taken(
        found["ends"][0] - began, median_gap(found["ends"]), statistics.fmean(found["lengths"][WARM_UP_STEPS:])
    )


def median_gap(ends: list[float]) -> float:
    return statistics.median(b - a for a, b in zip(ends[WARM_UP_STEPS:], ends[WARM_UP_STEPS + 1 :], strict=False))


def execute(arguments: list[str], variables: dict[str, str]) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} ended with status {done.returncode}:\n{done.stdout[-3000:]}")


SIDES: dict[str, Callable[[Work], Taken]] = {
    OURS: ours,
    "trl": trl,
    "trl-vllm": partial(trl, vllm="float32"),
    "trl-vllm-bf16": partial(trl, vllm="auto"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--warm-start", type=int, default=200, help="steps of imitation before; 0: random weights")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--only", nargs="+", choices=SIDES, default=list(SIDES))
    options = parser.parse_args()
    console = Console()
    console.width = max(console.width, 110)
    with tempfile.TemporaryDirectory() as folder:
        make_policy(Path(folder), options.layers, options.width, options.warm_start)
        work = Work(Path(folder), options.steps, options.prompts, options.group_size, options.max_tokens)
        before = os.getloadavg()
        rounds = [{side: SIDES[side](work) for side in options.only} for _ in range(options.rounds)]
    console.print(table(rounds))
    peer = "" if options.only == [OURS] else f"TRL {importlib.metadata.version('trl')}; "
    after = os.getloadavg()
    console.print(f"{peer}load average {before[0]:.1f} before and {after[0]:.1f} after, on {os.cpu_count()} cores")


def table(rounds: list[dict[str, Taken]]) -> Table:
    made = Table(title=f"GRPO on the countdown demo, {PROCESSES} processes; medians of {len(rounds)} rounds")
    for column in ("", "step, ms", "of ours, each round", "first step, s", "response tokens"):
        made.add_column(column, justify="left" if not column else "right")
    for side in rounds[0]:
        taken = [r[side] for r in rounds]
        ratios = [f"{r[side].step_s / r[OURS].step_s:.2f}x" for r in rounds if OURS in r]
        cells = [1e3 * statistics.median(t.step_s for t in taken), statistics.median(t.first_s for t in taken)]
        length = statistics.median(t.length for t in taken)
        made.add_row(side, f"{cells[0]:.0f}", ", ".join(ratios), f"{cells[1]:.1f}", f"{length:.1f}")
    return made


if __name__ == "__main__":
    main()
