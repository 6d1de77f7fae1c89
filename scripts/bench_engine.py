"""Times the trainer's step under its losses, with the fused head and with logits, on one batch in one process.

    python -m scripts.bench_engine [--vocab 32768] [--hidden 256] [--layers 4] [--tokens 4096]

A reheating step against a plain cross-entropy step; a GRPO score and update with the fused head against the logits form: time,
peak bytes of the tensors made meanwhile, and how far the losses of five steps lie apart.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_reheat.losses.policy_gradient import policy_loss
from megatron_reheat.losses.reheat import reheat_loss, sft_loss
from megatron_reheat.model.engine import Engine
from megatron_reheat.parallel import topology
from megatron_reheat.recipe import parse_config
from megatron_reheat.types import TrainBatch, TrainSequence
from scripts.storage_counter import StorageCounter

ROUNDS = 5
STEPS = 5
GRPO = partial(
    policy_loss,
    sampling_temperature=1.0,
    clip_low=0.2,
    clip_high=0.28,
    dual_clip=10.0,
    tis_cap=None,
    entropy_coef=0.0,
)
REHEAT = partial(reheat_loss, teacher_temperature=1.2, direction="forward")
UPDATE: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.0}


def make_model(arguments: argparse.Namespace, folder: Path) -> None:
    config = Qwen3Config(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)


def make_batch(arguments: argparse.Namespace, length: int = 256) -> TrainBatch:
    """A quarter of each sequence is prompt."""
    generator = np.random.default_rng(0)
    num_prompt, num_response = length // 4, length - length // 4
    return TrainBatch(
        tuple(
            TrainSequence(
                token_ids=generator.integers(0, arguments.vocab, length).astype(np.int32),
                num_prompt_tokens=num_prompt,
                advantage=float(generator.normal()),
                rollout_logprobs=generator.normal(-5.0, 0.3, num_response).astype(np.float32),
                old_logprobs=None,
            )
            for _ in range(arguments.tokens // length)
        )
    )


class Trainer:
    """An engine of one form, with the steps that are timed."""

    def __init__(self, folder: Path, batch: TrainBatch, *, fused_head: bool) -> None:
        config = parse_config(
            {
                "model": {"hf_path": str(folder), "dtype": "float32", "fused_head": fused_head},
                "data": {"path": "unused.jsonl", "max_prompt_tokens": 64},
                "rollout": {"max_tokens": 192},
                "reheat": {"max_tokens": 192},
                "parallel": {"microbatch_tokens": batch.num_tokens},
            }
        )
        self._place = topology.initialize(config)
        self.engine = Engine(config, folder, self._place)
        self.batch = batch
        self.start = self.engine.snapshot()

    def cross_entropy(self) -> float:
        return self.engine.update(self.batch, sft_loss, **UPDATE).metrics["sft/loss"]

    def reheat(self) -> float:
        return self.engine.update(self.batch, REHEAT, **UPDATE).metrics["reheat/kl"]

    def grpo(self) -> float:
        scores = self.engine.score(self.batch, temperature=1.0)
        batch = self.batch.with_old_logprobs([s - 0.1 for s in scores.logprobs])
        return self.engine.update(batch, GRPO, **UPDATE).metrics["policy/loss"]


def measure(trainer: Trainer, names: tuple[str, ...]) -> dict[str, tuple[float, int]]:
    """Median seconds per step, the steps in turns, and the peak bytes of one."""
    taken: dict[str, list[float]] = {name: [] for name in names}
    for attempt in range(ROUNDS + 1):
        for name in names:
            started = time.perf_counter()
            getattr(trainer, name)()
            if attempt:
                taken[name].append(time.perf_counter() - started)
    peaks = {}
    for name in names:
        with StorageCounter() as counter:
            getattr(trainer, name)()
        peaks[name] = counter.peak
    return {name: (statistics.median(taken[name]), peaks[name]) for name in names}


def losses(trainer: Trainer) -> list[float]:
    """Of five GRPO steps from the initial weights."""
    trainer.engine.restore(trainer.start)
    trainer.engine.reset_optimizer()
    return [trainer.grpo() for _ in range(STEPS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    batch = make_batch(arguments)
    names = ("cross_entropy", "reheat", "grpo")
    results, curves = {}, {}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        make_model(arguments, folder)
        for fused_head in (True, False):
            trainer = Trainer(folder, batch, fused_head=fused_head)
            results[fused_head] = measure(trainer, names)
            curves[fused_head] = losses(trainer)
            parameters = trainer.engine.num_parameters
            topology.finalize()
    shape = f"V={arguments.vocab}, {batch.num_tokens} tokens"
    title = f"{parameters / 1e6:.0f}M parameters, {shape}, {torch.get_num_threads()} threads"
    table = Table("step", "fused ms", "logits ms", "fused MB", "logits MB", title=title)
    for name in names:
        (fused_s, fused_bytes), (logits_s, logits_bytes) = results[True][name], results[False][name]
        memory = f"{fused_bytes / 2**20:.0f}", f"{logits_bytes / 2**20:.0f}"
        table.add_row(name, f"{fused_s * 1e3:.0f}", f"{logits_s * 1e3:.0f}", *memory)
    console = Console(width=120)
    console.print(table)
    ratio = results[True]["reheat"][0] / results[True]["cross_entropy"][0]
    console.print(f"reheating step / cross-entropy step, fused: {ratio:.2f}x (target <= 1.05x)")
    gap = max(abs(a - b) / abs(b) for a, b in zip(curves[True], curves[False], strict=True))
    console.print(
        f"losses of {STEPS} GRPO steps, fused against logits: at most {gap:.1e} apart, relative (target 1e-5)"
    )


if __name__ == "__main__":
    main()
