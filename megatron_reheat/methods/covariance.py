"""Which tokens lower the entropy most: their covariance of log-probability and advantage (arXiv 2505.22617, section 3).

    Cov(y_t) = (log pi(y_t) - mean log pi) (A_t - mean A)        means over the N tokens of the batch

The paper says "a batch of N tokens". Ours are all tokens of the step, at the weights that it began with: the selection is made
once, before the first update, and depends neither on the layout nor on how the batch is cut. The authors' code, and verl's and
SkyRL's after it, take the tokens of a micro-batch on one rank, at the weights of the moment; with one minibatch, one
micro-batch and one rank, that is the same.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_reheat.losses.surrogates import SELECTED
from megatron_reheat.methods.grpo import GRPO, Scoring
from megatron_reheat.types import FloatArray, Scores, TrainBatch, TrainSequence


def covariances(batch: TrainBatch) -> FloatArray:
    """[N] of the whole batch's response tokens in order, float64; as its sampler says them where nobody scored it yet."""
    logprobs = np.concatenate([_logprobs(s) for s in batch.sequences], dtype=np.float64)
    advantages = np.concatenate([np.broadcast_to(s.advantage, s.num_response_tokens) for s in batch.sequences])
    product: FloatArray = (logprobs - logprobs.mean()) * (advantages - advantages.mean(dtype=np.float64))
    return product


def with_selected(batch: TrainBatch, select: Callable[[FloatArray], np.ndarray]) -> TrainBatch:
    """`select` gives the places of the chosen tokens among all of the batch."""
    chosen = np.zeros(sum(s.num_response_tokens for s in batch.sequences), dtype=np.float32)
    chosen[select(covariances(batch))] = 1.0
    borders = np.cumsum([s.num_response_tokens for s in batch.sequences])[:-1]
    return batch.with_extra(SELECTED, np.split(chosen, borders))


def _logprobs(sequence: TrainSequence) -> FloatArray:
    known = sequence.rollout_logprobs if sequence.old_logprobs is None else sequence.old_logprobs
    assert known is not None
    return known


class CovarianceMethod(GRPO):
    """Chooses tokens by their covariance, once a step."""

    def weigh(self, batch: TrainBatch, scores: Scores, scoring: Scoring) -> TrainBatch:
        return with_selected(super().weigh(batch, scores, scoring), self.select)

    def select(self, covariances: FloatArray) -> np.ndarray:
        """[N] -> the places of the chosen tokens."""
        raise NotImplementedError

    def budget(self, num_tokens: int) -> int:
        """`fraction` of the tokens, at least one, as in the authors' code."""
        return max(int(self.options.fraction * num_tokens), 1)
