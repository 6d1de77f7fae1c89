"""The entropy that decides between RL and reheating, measured on the same thing in both.

It is the token mean, in nats at temperature 1, over ALL responses of a step's first generation batch, before any filter, and
of each response over the first `Config.judged_tokens` tokens: a response cut there is distributed like one that was sampled
under that limit, so stages with different limits read the same scale.

The trainer scores what it trains on, and dynamic sampling discards the rest. As long as that is little, it is scored, too.
Beyond that the value is that of 64 responses, chosen by their place alone. Whatever else is at hand for nothing is worse: which
groups are discarded depends on what was sampled, so exact values of the kept groups, alone or together with an estimate of the
others, are far off, and the sampler's log-probabilities of all responses scatter more (`scripts/measure_entropy.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from megatron_reheat.types import Collected, Completion, Prompt, Scores, TrainBatch, TrainSequence

T = TypeVar("T")

PROBES = 64


class JudgedEntropy(NamedTuple):
    """`mean` in nats; `estimated` where not every response of the batch went in."""

    mean: float
    estimated: bool


def choose_probes(collected: Collected, batch: TrainBatch) -> TrainBatch:
    """What `judge_entropy` needs scored besides `batch`, which is trained on: at most 64 responses."""
    scored = _by_completion(batch, batch.sequences)
    return TrainBatch(tuple(TrainSequence.of(p, c) for p, c in _judged(collected, batch) if id(c) not in scored))


def judge_entropy(
    collected: Collected,
    batch: TrainBatch,
    scores: Scores,
    probes: TrainBatch,
    probed: Scores,
    *,
    judged_tokens: int,
) -> JudgedEntropy:
    """
    Args:
        scores: those of `batch`.
        probed: those of `probes`, which `choose_probes` chose.
    """
    known = _by_completion(batch, scores.entropies) | _by_completion(probes, probed.entropies)
    judged = _judged(collected, batch)
    cut = [known[id(c)][:judged_tokens] for _, c in judged]
    mean = float(sum(row.sum(dtype="float64") for row in cut) / max(sum(map(len, cut)), 1))
    return JudgedEntropy(mean, len(judged) < sum(len(g.completions) for g in collected.first))


def _judged(collected: Collected, batch: TrainBatch) -> list[tuple[Prompt, Completion]]:
    """The responses that count, in order."""
    responses = [(g.prompt, c) for g in collected.first for c in g.completions]
    scored = _by_completion(batch, batch.sequences)
    if sum(id(c) not in scored for _, c in responses) <= PROBES:
        return responses
    return [responses[i] for i in np.linspace(0, len(responses) - 1, PROBES).round().astype(int)]


def _by_completion(batch: TrainBatch, values: Sequence[T]) -> dict[int, T]:
    """By the identity of the response that a sequence was made of."""
    return {id(s.completion): value for s, value in zip(batch.sequences, values, strict=True)}
