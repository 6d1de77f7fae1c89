"""Measures the training loop on this machine with the countdown demo, and compares it with what it is built from.

    python -m scripts.bench_loop [--steps 30] [--params 100M]

Engine start; weight sync against a plain copy of the same bytes; rollouts through the product's engine against vLLM alone;
grading beside the rollout against grading after it; training; and where the seconds of an RL step go in the demo's own layout.
Quote medians of two runs: machines are shared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from examples.countdown_cpu.make_model import make_model, make_tokenizer
from megatron_reheat.clock import Clock
from megatron_reheat.data.responses import response_text
from megatron_reheat.losses.policy_gradient import policy_loss
from megatron_reheat.model.engine import Engine
from megatron_reheat.parallel import topology
from megatron_reheat.recipe import load_config
from megatron_reheat.rewards.pool import VerifierPool
from megatron_reheat.rollout.embedded import EmbeddedEngine
from megatron_reheat.run_folder import read_metrics
from megatron_reheat.stages.inputs import read_inputs
from megatron_reheat.stages.policy import Policy
from megatron_reheat.types import At, Collected, SamplingParams
from scripts.bench_vllm_alone import VLLMAlone

RECIPE = "yaml/countdown_cpu.yaml"
WARM_UP_STEPS = 5
REPEATS = 7
OVERHEAD_TARGET = 0.10
LARGER = {"10M": (6, 416), "100M": (10, 1024)}  # layers, hidden size of the demo's architecture
PHASES = ("rollout", "reward", "score", "update", "sync", "other")
COMPUTE = ("rollout", "score", "update")

Row = tuple[str, str, str, str]


def seconds(action: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median wall time after one warm-up call."""
    action()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def demo_overrides(folder: Path) -> list[str]:
    return [
        f"model.hf_path={folder / 'model'}",
        f"data.path={folder / 'task' / 'train.jsonl'}",
        "sft.steps=0",
        "eval.data=",
        "controller.action=none",
        "run.name=loop",
        f"run.folder={folder}/{{name}}",
    ]


def make_demo(folder: Path) -> None:
    for script, name in (("make_model", "model"), ("make_task", "task")):
        command = [sys.executable, "-m", f"examples.countdown_cpu.{script}", str(folder / name)]
        subprocess.run(command, check=True, stdout=DEVNULL, stderr=DEVNULL)


def loop_rows(folder: Path, steps: int) -> list[Row]:
    """Runs `reheat train` and reads the seconds per phase from its metrics."""
    command = [sys.executable, "-m", "megatron_reheat", "train", RECIPE, *demo_overrides(folder)]
    subprocess.run([*command, f"run.steps={steps + WARM_UP_STEPS}", "logging.console=false"], check=True)
    records = [r for r in read_metrics(folder / "loop") if r.get("stage") == "rlvr"][WARM_UP_STEPS:]
    total = sum(r["time/step_s"] for r in records)
    rows, overhead = [], 0.0
    for phase in PHASES:
        share = sum(r[f"time/{phase}_s"] for r in records) / total
        overhead += share * (phase not in COMPUTE)
        median = statistics.median(r[f"time/{phase}_s"] for r in records)
        rows.append((f"step: {phase}", f"{1e3 * median:.1f} ms", "", f"{share:.1%} of the step"))
    verdict = "ok" if overhead <= OVERHEAD_TARGET else "MISSED"
    step = statistics.median(r["time/step_s"] for r in records)
    rate = statistics.median(r["throughput/tokens_per_s"] for r in records)
    rows.append((f"step: all, median of {len(records)}", f"{1e3 * step:.0f} ms", "", f"{rate:,.0f} tokens/s"))
    rows.append(("step: neither rollout nor forward/backward", f"{overhead:.1%}", f"<= {OVERHEAD_TARGET:.0%}", verdict))
    return rows


class Parts:
    """One replica's trainer and vLLM engine, made of the product's classes as a run makes them."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.config = load_config(RECIPE, [*demo_overrides(folder), f"model.hf_path={model}", "parallel.data=1"])
        self.inputs = read_inputs(self.config)
        place = topology.initialize(self.config)
        torch.set_num_threads(self.config.rollout.threads or 1)  # as a rank of the demo has
        rollout = self.config.rollout.model_copy(update={"max_model_len": self.inputs.max_model_len, "verify_every": 0})
        self.sampler = EmbeddedEngine(
            str(model), rollout, dtype=self.config.model.dtype, log_file=folder / "engine.log"
        )
        # before the model is built beside it, so that the engine is alone on its core as vLLM alone will be
        self.start_s = self.sampler.wait_ready()
        self.verifiers = VerifierPool(self.config.reward)
        decode = partial(response_text, self.inputs.tokenizer, stop_token_ids=self.inputs.stop_token_ids)
        self.engine = Engine(self.config, self.inputs.hf_folder, place)
        self.policy = Policy(self.engine, place, self.sampler, self.verifiers, decode)
        self.policy.publish(0)  # verified, so not timed

    def close(self) -> None:
        self.sampler.close()
        self.verifiers.close()
        topology.finalize()


def sync_row(parts: Parts, label: str) -> Row:
    version = 0

    def publish() -> Any:
        nonlocal version
        version += 1
        return parts.policy.publish(version)

    alone = vllm_alone(parts, [[1]])
    alone.close()
    num_bytes = publish().num_bytes
    source, target = torch.ones(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)
    took = seconds(publish)
    copy = seconds(lambda: target.copy_(source))
    limit = 2 * copy + alone.repack_s
    return (
        f"weight sync, {label}, {num_bytes / 1e6:.1f} MB",
        f"{1e3 * took:.1f} ms = {num_bytes / took / 1e9:.2f} GB/s",
        f"copy {1e3 * copy:.2f} ms, vLLM's repacking {1e3 * alone.repack_s:.1f} ms",
        f"target 2 copies and repacking, {1e3 * limit:.1f} ms: {'ok' if took <= limit else 'MISSED'}",
    )


def vllm_alone(parts: Parts, prompts: list[list[int]]) -> VLLMAlone:
    config, rollout, inputs = parts.config, parts.config.rollout, parts.inputs
    return VLLMAlone(
        {
            "model": str(inputs.hf_folder),
            "dtype": config.model.dtype,
            "max_model_len": inputs.max_model_len,
            "kv_cache_memory_bytes": (rollout.kv_cache_mb or 0) << 20,
            **rollout.model_dump(include={"max_num_seqs", "enforce_eager"}),
        },
        {"n": config.rl.group_size, "max_tokens": rollout.max_tokens, "stop_token_ids": list(inputs.stop_token_ids)},
        prompts,
        threads=rollout.threads or 1,
    )


def part_rows(parts: Parts) -> list[Row]:
    config, rl = parts.config, parts.config.rl
    prompts = list(parts.inputs.prompts)[: rl.prompts_per_step]
    params = SamplingParams(1.0, config.rollout.max_tokens, stop_token_ids=parts.inputs.stop_token_ids)
    alone = vllm_alone(parts, [list(p.token_ids) for p in prompts])
    seen: list[dict[str, float]] = []
    for seed in range(REPEATS + 1):  # in turns, so that all meet the same load from others
        forms = {}
        for while_sampling in (True, False) if seed % 2 else (False, True):
            parts.verifiers.while_sampling, clock = while_sampling, Clock()
            groups = parts.policy.sample(prompts, rl.group_size, params, seed, clock)
            forms["beside" if while_sampling else "after"] = clock.metrics()
        after = forms["after"]
        sampled = sum(len(c.token_ids) for g in groups for c in g.completions)
        both = {name: m["time/rollout_s"] + m["time/reward_s"] for name, m in forms.items()}
        ratio = {"ratio": both["beside"] / both["after"]}
        seen.append({**after, **both, **ratio, "ours": sampled / after["time/rollout_s"], **alone.generate()})
    alone.close()
    seen = seen[1:]
    median = {key: statistics.median(s[key] for s in seen) for key in seen[0]}
    best = {key: max(s[key] for s in seen) for key in seen[0]}

    at = At(step=1, rl_step=1, stage_step=0, temperature=1.0, seed=0)
    batch = parts.inputs.method.batch(Collected(groups, groups, [], {}), at)
    score = partial(parts.engine.score, batch, temperature=1.0)
    batch = batch.with_old_logprobs(score().logprobs)
    options = rl.model_dump(include={"clip_low", "clip_high", "dual_clip", "tis_cap", "entropy_coef"})
    loss = partial(policy_loss, sampling_temperature=1.0, **options)
    update = partial(parts.engine.update, batch, loss, lr=config.optimizer.lr, weight_decay=0.0)
    score_s, update_s = seconds(score), seconds(update)
    return [
        (
            "engine start",
            f"{parts.start_s:.1f} s",
            f"vLLM alone {alone.start_s:.1f} s",
            f"{parts.start_s / alone.start_s:.2f}x",
        ),
        *(
            (
                "rollout",
                f"{median['ours']:,.0f} tokens/s",
                f"{title} {median[kind]:,.0f}",
                f"{median['ours'] / median[kind]:.2f}x; best of each {best['ours'] / best[kind]:.2f}x",
            )
            for kind, title in (("plain", "vLLM alone"), ("same", "with logprobs and seeds"))
        ),
        (f"grading {len(batch)} responses", f"{1e3 * median['time/reward_s']:.1f} ms", "", ""),
        (
            "rollout and grading, beside each other",
            f"{1e3 * median['beside']:.1f} ms",
            f"one after the other {1e3 * median['after']:.1f} ms",
            f"{median['ratio']:.2f}x; {min(s['ratio'] for s in seen):.2f} to {best['ratio']:.2f}",
        ),
        (
            "score",
            f"{batch.num_tokens / score_s:,.0f} tokens/s",
            f"{batch.num_tokens} tokens",
            f"{1e3 * score_s:.0f} ms",
        ),
        ("update", f"{batch.num_tokens / update_s:,.0f} tokens/s", "the same", f"{1e3 * update_s:.0f} ms"),
    ]


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name}, {len(os.sched_getaffinity(0))} core(s), load {os.getloadavg()[0]:.1f}"


def measure(folder: Path, steps: int, params: str | None) -> list[Row]:
    make_demo(folder)
    rows = loop_rows(folder, steps)
    parts = Parts(folder, folder / "model")
    rows += [*part_rows(parts), sync_row(parts, "demo model")]
    parts.close()
    if params is not None:
        layers, width = LARGER[params]
        make_model(0, layers=layers, width=width).save_pretrained(folder / "larger")
        make_tokenizer().save_pretrained(folder / "larger")
        parts = Parts(folder, folder / "larger")
        rows.append(sync_row(parts, params))
        parts.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="RL steps to average over, after the warm-up")
    parser.add_argument("--params", choices=LARGER, help="repeat the weight sync with a model of this size")
    arguments = parser.parse_args()
    before = processor()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), arguments.steps, arguments.params)
    table = Table("measured", "megatron_reheat", "compared with", "", title=before)
    for row in rows:
        table.add_row(*row)
    Console(width=132).print(table)


if __name__ == "__main__":
    main()
