"""Clip-Cov (arXiv 2505.22617, section 4.2): a few of the tokens that would lower the entropy most have no gradient.

Of the tokens whose covariance (`methods.covariance`) lies between two bounds, r N at random are taken out of the clipped loss;
its denominator stays. r = 2e-4, bounds 1 and 5 are the paper's, for advantages normalised by the group's deviation.

Where a step's only update scores the batch itself, it is too late to choose: log pi is then as the sampler said it, which is
as far from the trainer's as `rollout.mismatch_limit` allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from pydantic import Field

from megatron_reheat.config import Config
from megatron_reheat.config_fields import Section
from megatron_reheat.losses.policy_gradient import SurrogateLoss
from megatron_reheat.losses.surrogates import without_selected
from megatron_reheat.methods.covariance import CovarianceMethod, with_selected
from megatron_reheat.types import At, Collected, FloatArray, TrainBatch


class ClipCov(CovarianceMethod):
    """GRPO's loss without the chosen tokens; they are drawn by `At.seed`, the same on every rank."""

    class Options(Section):
        """Defaults are the paper's, for advantages normalised by the group's deviation."""

        fraction: float = Field(
            default=2e-4, gt=0, le=1, description="r: tokens without a gradient, of all; at least one"
        )
        low: float = Field(default=1.0, description="a candidate's covariance is above this")
        high: float = Field(default=5.0, description="and below this")

    scores_in_loss = True

    @classmethod
    def problems(cls, config: Config, options: Any) -> Iterator[str]:
        if options.low >= options.high:
            yield f"rl.options.low {options.low:g} is not below rl.options.high {options.high:g}; change one of them"

    def batch(self, collected: Collected, at: At) -> TrainBatch:
        self._seed = at.seed
        batch = super().batch(collected, at)
        return with_selected(batch, self.select) if len(batch) else batch

    def select(self, covariances: FloatArray) -> np.ndarray:
        candidates = np.flatnonzero((covariances > self.options.low) & (covariances < self.options.high))
        self._candidates = len(candidates) / len(covariances)
        count = min(self.budget(len(covariances)), len(candidates))
        return np.random.default_rng(self._seed).choice(candidates, count, replace=False)

    def surrogate(self) -> SurrogateLoss:
        return partial(without_selected, surrogate=super().surrogate())

    def metrics(self) -> dict[str, float]:
        return {"clip_cov/candidate_fraction": self._candidates}
