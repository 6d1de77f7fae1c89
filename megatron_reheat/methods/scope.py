"""SCOPE-RL (arXiv 2510.08141): correct answers, sampled at a temperature that the entropy's error sets, with advantage one.

At a high temperature training on correct samples raises the entropy, at a low one it lowers it. With H the entropy of the step
before, H0 the target, and some prompts of the batch sampled again at temperature T,

    T = clip(1 + H0 - H, 0.8, 1.2)
    J = J_GRPO + alpha E_T [ 1/G' sum_i 1[R_i = 1] 1/|o_i| sum_t min(r, clip(r)) ]

in which G' counts all those samples, the wrong ones too, and r is at the temperature of the others. That the samples were drawn
at T is intended and not corrected. `variant: aepo` is the paper's early form: T is 1.2 below the target and 0.8 above it, a
quarter of the prompts is sampled again, and samples whose advantage in their group is above 0.05 take, with advantage one, the
places of the batch's first rows; at most `replaced_rows`, half of that above the target.

Our reading, where the text was not at hand: alpha is both the share of prompts, at least one, and the weight, and T multiplies
the run's sampling temperature, as in an independent implementation; H is the exact entropy that the controller sees, also for
`aepo`, whose code takes the mean of -log p. The first step has no entropy before it and nothing to correct. The paper's second
term has no KL, nor its runs; `rl.kl_coef` here is of all samples, these by their weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pydantic import Field

from megatron_reheat.clock import Clock
from megatron_reheat.config import Config
from megatron_reheat.config_fields import MAX_TEMPERATURE, MIN_TEMPERATURE, Section
from megatron_reheat.methods.grpo import ASSUMED_ACCURACY, GRPO, Costs, Sampling
from megatron_reheat.types import At, Collected, TrainBatch, TrainSequence

AEPO_MIN_ADVANTAGE = 0.05
AEPO_PROMPT_SHARE = 0.25


class SCOPE(GRPO):
    """GRPO, and samples that steer the entropy (`Collected.extra`); none before a step has measured it."""

    class Options(Section):
        """`alpha` is for `scope` alone, `replaced_rows` for `aepo` alone."""

        variant: Literal["scope", "aepo"] = Field(default="scope", description="aepo: the paper's early form")
        target_entropy: float = Field(default=0.5, gt=0, description="H0, nats per token")
        alpha: float = Field(
            default=1 / 64, gt=0, le=1, description="scope: share of prompts sampled again, and loss weight"
        )
        min_temperature: float = Field(
            default=0.8, gt=0, lt=1, description="lowest T, in units of the sampling temperature"
        )
        max_temperature: float = Field(default=1.2, gt=1, description="highest T, in the same units")
        replaced_rows: int = Field(default=60, gt=0, description="aepo: rows of the batch that are replaced, at most")

    options: Options

    @classmethod
    def problems(cls, config: Config, options: Any) -> Iterator[str]:
        rl, controller = config.rl, config.controller
        if rl.entropy_coef:
            yield "rl.method scope steers the entropy by itself; set rl.entropy_coef=0"
        rows = rl.prompts_per_step * rl.group_size
        if options.variant == "aepo" and options.replaced_rows >= rows:
            yield (
                f"rl.options.replaced_rows {options.replaced_rows} leaves nothing of the batch of {rows} rows "
                "(rl.prompts_per_step x rl.group_size); lower it"
            )
        highest = config.rollout.temperature
        if controller.action == "rollout_temperature":
            highest = max(highest, controller.rollout_temperature)
        hottest = highest * options.max_temperature
        coldest = config.rollout.temperature * options.min_temperature
        if hottest > MAX_TEMPERATURE:
            yield (
                f"rl.options.max_temperature times the sampling temperature is {hottest:g}, above {MAX_TEMPERATURE:g}, vLLM's "
                "limit; lower one of them"
            )
        if coldest < MIN_TEMPERATURE:
            yield (
                f"rl.options.min_temperature times the sampling temperature is {coldest:g}, below {MIN_TEMPERATURE:g}, vLLM's "
                "limit; raise one of them"
            )

    @classmethod
    def costs(cls, config: Config, options: Any) -> Costs:
        prompts = config.rl.prompts_per_step
        again = again_count(options, prompts) / prompts
        return Costs(sampled=again, trained=0.0 if options.variant == "aepo" else ASSUMED_ACCURACY * again)

    def collect(self, sampling: Sampling, at: At, clock: Clock) -> Collected:
        collected, o = super().collect(sampling, at, clock), self.options
        if at.entropy is None or not collected.groups:
            return collected
        temperature = self.temperature(at.entropy)
        prompts = [g.prompt for g in collected.groups[: again_count(o, len(collected.groups))]]
        extra = sampling.again(prompts, self.config.rl.group_size, at.temperature * temperature, clock)
        seen = {
            "scope/temperature": temperature,
            "scope/positive_fraction": float(np.mean([g.accuracy for g in extra])),
            "scope/sampled_ratio": len(extra) / len(collected.groups),
        }
        return replace(collected, metrics={**collected.metrics, **seen}, extra=tuple(extra))

    def temperature(self, entropy: float) -> float:
        """That of the samples which steer, in units of the sampling temperature."""
        o = self.options
        if o.variant == "aepo":
            return o.max_temperature if entropy <= o.target_entropy else o.min_temperature
        return float(np.clip(1 + o.target_entropy - entropy, o.min_temperature, o.max_temperature))

    def batch(self, collected: Collected, at: At) -> TrainBatch:
        own = super().batch(collected, at).sequences
        if self.options.variant == "aepo":
            steering = self._replacing(collected, at)
            return TrainBatch((*steering, *own[len(steering) :]))
        return TrainBatch((*own, *self._beside(collected, at)))

    def _beside(self, collected: Collected, at: At) -> list[TrainSequence]:
        """The correct samples, with a share of their own each: together at most alpha of the loss's weight."""
        count = sum(len(g.completions) for g in collected.extra)
        return [
            replace(
                TrainSequence.of(g.prompt, completion, at.temperature),
                advantage=1.0,
                share=self.options.alpha / (count * max(len(completion.token_ids), 1)),
            )
            for g in collected.extra
            for completion, reward in zip(g.completions, g.rewards, strict=True)
            if reward.correct
        ]

    def _replacing(self, collected: Collected, at: At) -> list[TrainSequence]:
        """The samples that are better than their group, as many as may be replaced."""
        o, entropy = self.options, at.entropy
        rows = o.replaced_rows if entropy is not None and entropy <= o.target_entropy else o.replaced_rows // 2
        steering = (s for g in collected.extra for s in self.sequences(g, at))
        return [replace(s, advantage=1.0) for s in steering if s.advantage > AEPO_MIN_ADVANTAGE][:rows]


def again_count(options: SCOPE.Options, num_prompts: int) -> int:
    """How many of a step's prompts are sampled again."""
    return max(1, round((AEPO_PROMPT_SHARE if options.variant == "aepo" else options.alpha) * num_prompts))
