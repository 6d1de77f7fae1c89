"""avg@k and pass@k on held-out prompts, sampled by the run's own engines."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_reheat.analysis.passk import bootstrap_interval, pass_at_k_by_prompt
from megatron_reheat.clock import Clock
from megatron_reheat.config_data import EvalConfig
from megatron_reheat.data.prompts import PromptDataset
from megatron_reheat.stages.outcome import derive_seed
from megatron_reheat.stages.policy import Policy
from megatron_reheat.types import SamplingParams, TrainBatch, TrainSequence

# any constant: every evaluation of every arm draws from the same streams
EVAL_SEED = 20260600755


def evaluate_all(
    policy: Policy, held_out: Mapping[str, PromptDataset], config: EvalConfig, stop_token_ids: tuple[int, ...]
) -> dict[str, float]:
    """`evaluate` on `eval.data`, and on each of `eval.suites` as `eval/NAME/...`."""
    params = SamplingParams(config.temperature, config.max_tokens, config.top_p, stop_token_ids)
    metrics: dict[str, float] = {}
    for name, prompts in held_out.items():
        found = evaluate(policy, prompts, config.samples_of(name), params)
        metrics |= {f"eval/{name}/{metric}" if name else f"eval/{metric}": value for metric, value in found.items()}
    return metrics


def evaluate(policy: Policy, prompts: PromptDataset, num_samples: int, params: SamplingParams) -> dict[str, float]:
    """`avg_at_k`, `pass_at_k` over `num_samples` samples a prompt with 95% bootstrap intervals over prompts (`_low`, `_high`),
    and the entropy of those samples."""
    groups = policy.sample(list(prompts), num_samples, params, derive_seed(EVAL_SEED), Clock())
    correct = np.array([[r.correct for r in g.rewards] for g in groups])
    batch = TrainBatch(tuple(TrainSequence.of(g.prompt, c) for g in groups for c in g.completions))
    scores = policy.engine.score(batch, temperature=1.0)
    by_prompt = {"avg_at_k": correct.mean(axis=1), "pass_at_k": pass_at_k_by_prompt(correct, num_samples)}
    metrics = {
        "entropy": scores.mean_entropy,
        "response_length": float(np.mean([s.num_response_tokens for s in batch.sequences])),
    }
    for name, values in by_prompt.items():
        low, high = bootstrap_interval(values, EVAL_SEED)
        metrics |= {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
    return metrics
