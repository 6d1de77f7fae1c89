"""Measures what the controller's entropy is off by, on a policy that has collapsed, against every response's own entropies.

    python -m scripts.measure_entropy RECIPE key=value ... [--batches 100]

The recipe's policy and prompts (name a collapsed policy by model.hf_path) give generation batches as in RL with dynamic
sampling; the trainer scores all of each batch. Printed are mean error and spread of the value that the controller gets, and of
others that would cost as little. Errors are against the exact value of the same batch, so they say nothing of sampling.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from megatron_reheat.clock import Clock
from megatron_reheat.data.responses import response_text
from megatron_reheat.model.engine import Engine
from megatron_reheat.parallel import topology
from megatron_reheat.recipe import load_config
from megatron_reheat.rewards.pool import VerifierPool
from megatron_reheat.rollout.embedded import EmbeddedEngine
from megatron_reheat.stages.collect import Collector
from megatron_reheat.stages.entropy import choose_probes, judge_entropy
from megatron_reheat.stages.inputs import read_inputs
from megatron_reheat.stages.policy import Policy
from megatron_reheat.types import At, Collected, FloatArray, Scores, TrainBatch, TrainSequence

OVERRIDES = ["parallel.data=1", "sft.steps=0", "eval.data=", "rl.dynamic_sampling=true", "rl.max_generation_batches=1"]


def estimates(collected: Collected, entropies: list[FloatArray], limit: int) -> dict[str, float]:
    """All of them on one batch; `entropies` are those of every response, in order."""
    completions = [c for g in collected.first for c in g.completions]
    discarded = {id(c) for g in collected.discarded for c in g.completions}
    own = [-c.rollout_logprobs for c in completions]
    exact = {id(c): e for c, e in zip(completions, entropies, strict=True)}
    kept = [exact[id(c)] for g in collected.groups for c in g.completions]
    mixed = [o if id(c) in discarded else e for c, o, e in zip(completions, own, entropies, strict=True)]
    trained = TrainBatch(tuple(TrainSequence.of(g.prompt, c) for g in collected.groups for c in g.completions))
    probes = choose_probes(collected, trained)
    probed = Scores([], [exact[id(s.completion)] for s in probes.sequences])
    judged = judge_entropy(collected, trained, Scores([], kept), probes, probed, judged_tokens=limit)
    return {
        "every response exactly": mean(entropies),
        "the controller's": judged.mean,
        "kept groups only": mean(kept),
        "kept exactly, minus log-probabilities of the rest": mean(mixed),
        "minus log-probabilities of all": mean(own),
        "every response exactly, first quarter of the limit": mean([e[: limit // 4] for e in entropies]),
    }


def mean(rows: list[FloatArray]) -> float:
    return float(np.concatenate(rows).mean(dtype="float64")) if rows else float("nan")


def measure(recipe: str, overrides: list[str], batches: int, log_file: Path) -> tuple[list[dict[str, float]], float]:
    """The estimates of each batch, and the fraction of groups that the filter kept."""
    config = load_config(recipe, [*OVERRIDES, *overrides])
    inputs = read_inputs(config)
    place = topology.initialize(config)
    torch.set_num_threads(1)
    rollout = config.rollout.model_copy(update={"max_model_len": inputs.max_model_len})
    sampler = EmbeddedEngine(str(inputs.hf_folder), rollout, dtype=config.model.dtype, log_file=log_file)
    verifiers = VerifierPool(config.reward)
    engine = Engine(config, inputs.hf_folder, place)
    decode = partial(response_text, inputs.tokenizer, stop_token_ids=inputs.stop_token_ids)
    policy = Policy(engine, place, sampler, verifiers, decode)
    policy.publish(0)
    collector = Collector(config, policy, inputs.cursors(config)[0], inputs.stop_token_ids, lambda: False)
    rows, kept = [], 0.0
    for step in range(1, batches + 1):
        collected = collector.collect(At(step, step, step - 1, 1.0, 0), Clock(), group_size=config.rl.group_size)
        batch = TrainBatch(tuple(TrainSequence.of(g.prompt, c) for g in collected.first for c in g.completions))
        entropies = engine.score(batch, temperature=1.0).entropies
        rows.append(estimates(collected, entropies, config.judged_tokens))
        kept += collected.metrics["sampling/kept_fraction"] / batches
    sampler.close()
    verifiers.close()
    topology.finalize()
    return rows, kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--batches", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, kept = measure(options.recipe, options.overrides, options.batches, Path(folder) / "vllm.log")
    exact = np.array([r["every response exactly"] for r in rows])
    table = Table("entropy over a batch, nats", "mean", "mean error", "its standard error", "spread of the error")
    for name in rows[0]:
        values = np.array([r[name] for r in rows])
        error = (values - exact)[np.isfinite(values)]
        spread = error.std(ddof=1)
        table.add_row(
            name,
            f"{np.nanmean(values):.4f}",
            f"{error.mean():+.4f}",
            f"{spread / len(error) ** 0.5:.4f}",
            f"{spread:.4f}",
        )
    table.title = (
        f"{len(rows)} batches, {kept:.0%} of the groups kept; the exact value itself spreads by {exact.std(ddof=1):.4f}"
    )
    Console(width=132).print(table)


if __name__ == "__main__":
    main()
