"""Measures the training loop on this machine with the countdown demo, and compares it with what it is built from.

    python -m scripts.bench_loop [--steps 30] [--params 100M]

Engine start; weight sync against a plain copy of the same bytes; rollouts through the product's engine against vLLM alone;
training; and where the seconds of an RL step go in the demo's own layout. Quote medians of two runs: machines are shared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

RECIPE = "yaml/countdown_cpu.yaml"
WARM_UP_STEPS = 5
REPEATS = 7
OVERHEAD_TARGET = 0.15
SYNC_SLACK_S = 0.050
WIDTHS = {"0.36M": (3, 96), "10M": (6, 416), "100M": (10, 1024)}  # layers, hidden size of the demo's architecture
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


# -- the whole loop, started as a user would ---------------------------------------------------------------------------


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
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def loop_rows(folder: Path, steps: int) -> list[Row]:
    """Runs `reheat train` and reads the seconds per phase from its metrics."""
    from megatron_reheat.run_folder import read_metrics

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


# -- its parts, one by one, in this process ----------------------------------------------------------------------------


class Parts:
    """One replica's trainer and vLLM engine, made of the product's classes as a run makes them."""

    def __init__(self, folder: Path, model: Path) -> None:
        import torch

        from megatron_reheat.config import load_config
        from megatron_reheat.model.engine import Engine
        from megatron_reheat.parallel import topology
        from megatron_reheat.rewards.pool import VerifierPool
        from megatron_reheat.rollout.embedded import EmbeddedEngine
        from megatron_reheat.stages.inputs import read_inputs
        from megatron_reheat.stages.policy import Policy

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
        self.engine = Engine(self.config, self.inputs.hf_folder, place)
        self.policy = Policy(self.engine, place, self.sampler, self.verifiers, self.decode)
        self.policy.publish(0)  # verified, so not timed

    def decode(self, token_ids: Any) -> str:
        return self.inputs.tokenizer.decode(token_ids, skip_special_tokens=True)

    def close(self) -> None:
        self.sampler.close()
        self.verifiers.close()


def sync_row(parts: Parts, label: str) -> Row:
    import torch

    version = 0

    def publish() -> Any:
        nonlocal version
        version += 1
        return parts.policy.publish(version)

    num_bytes = publish().num_bytes
    took = seconds(publish)
    source, target = torch.ones(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)
    copy = seconds(lambda: target.copy_(source))
    verdict = "ok" if took <= 2 * copy + SYNC_SLACK_S else "MISSED"
    return (
        f"weight sync, {label} ({num_bytes / 1e6:.1f} MB), against a copy",
        f"{1e3 * took:.1f} ms = {num_bytes / took / 1e9:.2f} GB/s",
        f"{1e3 * copy:.2f} ms = {num_bytes / copy / 1e9:.1f} GB/s",
        f"target 2x + {1e3 * SYNC_SLACK_S:.0f} ms: {verdict}",
    )


def part_rows(parts: Parts, folder: Path) -> list[Row]:
    from megatron_reheat.losses.policy import policy_loss
    from megatron_reheat.stages.clock import Clock
    from megatron_reheat.stages.rlvr import make_train_batch
    from megatron_reheat.types import SamplingParams

    config, rl = parts.config, parts.config.rl
    prompts = list(parts.inputs.prompts)[: rl.prompts_per_step]
    params = SamplingParams(1.0, config.rollout.max_tokens, stop_token_ids=parts.inputs.stop_token_ids)
    rates, grading = [], []
    for seed in range(REPEATS + 1):
        clock = Clock()
        groups = parts.policy.sample(prompts, rl.group_size, params, seed, clock)
        sampled = sum(len(c.token_ids) for g in groups for c in g.completions)
        rates.append(sampled / clock.metrics()["time/rollout_s"])
        grading.append(clock.metrics()["time/reward_s"])
    ours = statistics.median(rates[1:])
    alone = vllm_alone(parts, [p.token_ids for p in prompts], params, folder)

    batch = make_train_batch(groups, config)
    score = partial(parts.engine.score, batch, temperature=1.0)
    batch = batch.with_old_logprobs(score().logprobs)
    loss = partial(policy_loss, sampling_temperature=1.0, clip_low=rl.clip_low, clip_high=rl.clip_high)
    update = partial(parts.engine.update, batch, loss, lr=config.optimizer.lr, weight_decay=0.0)
    score_s, update_s = seconds(score), seconds(update)
    size = f"{len(batch)} sequences, {batch.num_tokens} tokens"
    return [
        ("engine start", f"{parts.start_s:.1f} s", f"{alone['start_s']:.1f} s", f"{parts.start_s / alone['start_s']:.2f}x"),
        ("rollout, against vLLM alone", f"{ours:,.0f} tok/s", f"{alone['plain']:,.0f} tok/s", f"{ours / alone['plain']:.2f}x"),
        ("  ... with logprobs and a seed per sample", f"{ours:,.0f} tok/s", f"{alone['same']:,.0f} tok/s", f"{ours / alone['same']:.2f}x"),
        (f"grading {len(batch)} responses", f"{1e3 * statistics.median(grading[1:]):.1f} ms", "", ""),
        (f"score ({size})", f"{batch.num_tokens / score_s:,.0f} tok/s", "", f"{1e3 * score_s:.0f} ms"),
        ("update (forward, backward, AdamW)", f"{batch.num_tokens / update_s:,.0f} tok/s", "", f"{1e3 * update_s:.0f} ms"),
    ]  # fmt: skip


# -- vLLM alone ----------------------------------------------------------------------------------------------------------


def vllm_alone(parts: Parts, prompts: list[tuple[int, ...]], params: Any, folder: Path) -> dict[str, float]:
    """The same model, prompts and limits through a bare `vllm.LLM` in a process of its own."""
    rollout = parts.config.rollout
    task = {
        "engine": {
            "model": str(parts.inputs.hf_folder),
            "dtype": parts.config.model.dtype,
            "max_num_seqs": rollout.max_num_seqs,
            "max_model_len": parts.inputs.max_model_len,
            "enforce_eager": rollout.enforce_eager,
            "kv_cache_memory_bytes": (rollout.kv_cache_mb or 0) << 20,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
        },
        "prompts": [list(p) for p in prompts],
        "sampling": {
            "n": parts.config.rl.group_size,
            "max_tokens": params.max_tokens,
            "stop_token_ids": list(params.stop_token_ids),
        },
    }
    (folder / "task.json").write_text(json.dumps(task))
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
    environment["OMP_NUM_THREADS"] = str(rollout.threads or 1)
    with (folder / "vllm_alone.log").open("w") as log:
        command = [sys.executable, "-m", "scripts.bench_loop", "--vllm-alone", str(folder / "task.json")]
        subprocess.run(command, env=environment, stdout=log, stderr=log, check=True)
    return json.loads((folder / "task.json.result").read_text())


def measure_vllm_alone(path: Path) -> None:
    started = time.time()
    from vllm import LLM, SamplingParams

    task = json.loads(path.read_text())
    llm = LLM(**task["engine"])
    result = {"start_s": time.time() - started}
    prompts = [{"prompt_token_ids": p} for p in task["prompts"]]
    n = task["sampling"]["n"]
    shared = {**task["sampling"], "temperature": 1.0, "detokenize": False, "ignore_eos": True}
    plain = [SamplingParams(**shared) for _ in prompts]
    same = [SamplingParams(**shared, logprobs=0, flat_logprobs=True, seed=i * n) for i in range(len(prompts))]
    for name, params in (("plain", plain), ("same", same)):
        rates = []
        for _ in range(REPEATS + 1):
            begun = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            sampled = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
            rates.append(sampled / (time.perf_counter() - begun))
        result[name] = statistics.median(rates[1:])
    path.with_name(path.name + ".result").write_text(json.dumps(result))


# -- report ------------------------------------------------------------------------------------------------------------


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return f"{name}, {len(os.sched_getaffinity(0))} core(s), load {os.getloadavg()[0]:.1f}"


def measure(folder: Path, steps: int, params: str | None) -> list[Row]:
    from examples.countdown_cpu.make_model import make_model, make_tokenizer

    make_demo(folder)
    rows = loop_rows(folder, steps)
    parts = Parts(folder, folder / "model")
    rows += [*part_rows(parts, folder), sync_row(parts, "demo model")]
    parts.close()
    if params is not None:
        layers, width = WIDTHS[params]
        make_model(0, layers=layers, width=width).save_pretrained(folder / "larger")
        make_tokenizer().save_pretrained(folder / "larger")
        parts = Parts(folder, folder / "larger")
        rows.append(sync_row(parts, params))
        parts.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="RL steps to average over, after the warm-up")
    parser.add_argument("--params", choices=WIDTHS, help="repeat the weight sync with a model of this size")
    parser.add_argument("--vllm-alone", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.vllm_alone:
        measure_vllm_alone(arguments.vllm_alone)
        return
    from rich.console import Console
    from rich.table import Table

    before = processor()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), arguments.steps, arguments.params)
    table = Table("measured", "megatron_reheat", "compared with", "", title=before)
    for row in rows:
        table.add_row(*row)
    Console(width=132).print(table)


if __name__ == "__main__":
    main()
