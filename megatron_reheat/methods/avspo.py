"""AVSPO (arXiv 2605.21125): virtual rewards give groups whose rewards are all equal an advantage, when too many of them are.

    ACR = fraction of the batch's groups whose rewards have a deviation below 1e-6
    tau <- tau + eta sign(J_n - J_(n-1)) (ACR - tau)          J the mean reward of a step
    if ACR > tau, in each such group of G rewards, of which R is the largest:
        K = min(G, ceil(G ACR^0.5))
        R > 0:  R (1 - k / (K + 1)),  k = 1..K                spread below
        R = 0:  0.1 (K - k + 1) / K,  k = 1..K                spread above
        A = (reward - mean) / (std + 1e-6), over real and virtual rewards together; only real samples are trained on

All other groups are GRPO's. Pushing a group of wrong answers down has no direction, and pushing one of right answers up lowers
the entropy faster: both are the method's.

Our reading, from an independent transcription: the deviation is the population's, here as in the ACR; the first step, which has
none before it, leaves tau where it is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field

from megatron_reheat.config import Config
from megatron_reheat.config_fields import Section
from megatron_reheat.losses.advantage import EPSILON
from megatron_reheat.methods.grpo import GRPO, Tools
from megatron_reheat.types import At, Collected, Group, TrainBatch, TrainSequence

COLLAPSED_BELOW = 1e-6


class AVSPO(GRPO):
    """GRPO but for the advantages of groups whose rewards are all equal, in steps where the ACR is above tau."""

    class Options(Section):
        """Of tau, which a run that is resumed takes from its checkpoint."""

        threshold: float = Field(default=0.5, ge=0, le=1, description="tau at the start")
        threshold_rate: float = Field(default=0.01, ge=0, le=1, description="eta, how fast tau follows the ACR")

    options: Options

    def __init__(self, config: Config, options: Any, tools: Tools) -> None:
        super().__init__(config, options, tools)
        self._threshold: float = options.threshold
        self._mean_reward: float | None = None
        self._collapse_rate = 0.0

    @classmethod
    def problems(cls, config: Config, options: Any) -> Iterator[str]:
        rl, reward = config.rl, config.reward
        if rl.dynamic_sampling:
            yield "rl.method avspo is for the groups that rl.dynamic_sampling leaves out; set rl.dynamic_sampling=false"
        if reward.kind == "function":
            yield "rl.method avspo adds virtual rewards of 0 and 1, and reward.function gives any; use another method"
        if reward.incorrect != 0:
            yield (
                f"rl.method avspo tells right groups from wrong ones by a reward of 0, and reward.incorrect is "
                f"{reward.incorrect:g}; set it to 0"
            )
        if rl.overlong_buffer and rl.overlong_penalty:
            yield "rl.method avspo has no rule for rewards below 0, which the overlong penalty makes; set rl.overlong_buffer=0"

    def batch(self, collected: Collected, at: At) -> TrainBatch:
        rewards = [self.rewards(g) for g in collected.groups]
        if rewards:
            self._collapse_rate = statistics.fmean(map(is_collapsed, rewards))
            self._follow(statistics.fmean(r for group in rewards for r in group))
        return super().batch(collected, at)

    def sequences(self, group: Group, at: At) -> list[TrainSequence]:
        sequences, rewards = super().sequences(group, at), self.rewards(group)
        if not (self._acts and is_collapsed(rewards)):
            return sequences
        spread = [*rewards, *virtual_rewards(rewards, self._collapse_rate)]
        mean, scale = statistics.fmean(spread), 1.0
        if self.config.rl.normalize_by_std:
            scale = statistics.pstdev(spread) + EPSILON
        return [replace(s, advantage=(r - mean) / scale) for s, r in zip(sequences, rewards, strict=True)]

    def metrics(self) -> dict[str, float]:
        return {
            "avspo/collapse_rate": self._collapse_rate,
            "avspo/threshold": self._threshold,
            "avspo/augmented_fraction": self._collapse_rate if self._acts else 0.0,
        }

    def state(self) -> dict[str, Any]:
        return {"threshold": self._threshold, "mean_reward": self._mean_reward}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._threshold, self._mean_reward = state["threshold"], state["mean_reward"]

    @property
    def _acts(self) -> bool:
        return self._collapse_rate > self._threshold

    def _follow(self, mean_reward: float) -> None:
        if self._mean_reward is not None and mean_reward != self._mean_reward:
            step = math.copysign(self.options.threshold_rate, mean_reward - self._mean_reward)
            self._threshold += step * (self._collapse_rate - self._threshold)
        self._mean_reward = mean_reward


def is_collapsed(rewards: Sequence[float]) -> bool:
    """Whether a group's rewards are all equal, up to a deviation of COLLAPSED_BELOW."""
    return statistics.pstdev(rewards) < COLLAPSED_BELOW


def virtual_rewards(rewards: Sequence[float], collapse_rate: float) -> list[float]:
    """Those of the virtual samples of a group whose rewards are all equal; `collapse_rate` is above 0."""
    size, largest = len(rewards), max(rewards)
    count = min(size, math.ceil(size * math.sqrt(collapse_rate)))
    if largest > 0:
        return [largest * (1 - k / (count + 1)) for k in range(1, count + 1)]
    return [0.1 * (count - k + 1) / count for k in range(1, count + 1)]
