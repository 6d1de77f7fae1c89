"""avg@k and pass@k on held-out prompts, sampled by the run's own engines."""

from __future__ import annotations

import numpy as np

from megatron_reheat.analysis.passk import bootstrap_interval, pass_at_k_by_prompt
from megatron_reheat.clock import Clock
from megatron_reheat.config import EvalConfig
from megatron_reheat.data.prompts import PromptDataset
from megatron_reheat.stages.outcome import derive_seed
from megatron_reheat.stages.policy import Policy
from megatron_reheat.types import SamplingParams, TrainBatch, TrainSequence

# any constant: every evaluation of every arm draws from the same streams
EVAL_SEED = 20260600755


def evaluate(
    policy: Policy, prompts: PromptDataset, config: EvalConfig, stop_token_ids: tuple[int, ...]
) -> dict[str, float]:
    """`eval/avg_at_k`, `eval/pass_at_k` over `eval.num_samples` samples a prompt with 95% bootstrap intervals over prompts
    (`_low`, `_high`), and the entropy of those samples."""
    clock = Clock()
    params = SamplingParams(config.temperature, config.max_tokens, config.top_p, stop_token_ids)
    groups = policy.sample(list(prompts), config.num_samples, params, derive_seed(EVAL_SEED), clock)
    correct = np.array([[r.correct for r in g.rewards] for g in groups])
    batch = TrainBatch(tuple(TrainSequence.of(g.prompt, c) for g in groups for c in g.completions))
    scores = policy.engine.score(batch, temperature=1.0)
    by_prompt = {
        "eval/avg_at_k": correct.mean(axis=1),
        "eval/pass_at_k": pass_at_k_by_prompt(correct, config.num_samples),
    }
    metrics = {
        "eval/entropy": scores.mean_entropy,
        "eval/response_length": float(np.mean([s.num_response_tokens for s in batch.sequences])),
    }
    for name, values in by_prompt.items():
        low, high = bootstrap_interval(values, EVAL_SEED)
        metrics |= {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
    return metrics
