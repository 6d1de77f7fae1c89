"""RLSD (arXiv 2604.03128): a teacher that has seen a solution tells how much of a sample's advantage each token gets.

    D = log p_teacher(y) - log p_policy(y)                     per token, both before the step's first update
    A_t = A [(1 - lam) + lam clip(exp(sign(A) D), 1 - eps, 1 + eps)]
    lam = lam_0 max(0, 1 - k / decay)                          k the RL step, from 1

then GRPO's loss, in which the weights are constants. The teacher is the policy itself behind a prompt with the solution
(`methods.privileged`), and reads only samples whose advantage is not zero. lam counts from 1, as the authors' code base does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from megatron_reheat.config import Config
from megatron_reheat.losses.policy_gradient import MAX_LOG_RATIO
from megatron_reheat.methods.grpo import Costs, Scoring, Tools
from megatron_reheat.methods.privileged import Privileged, teacher_view
from megatron_reheat.types import FloatArray, HintSource, Scores, TrainBatch


class RLSD(Privileged):
    """GRPO with advantages per token, [R], for the samples that the teacher reads."""

    class Options(Privileged.Options):
        """Of the teacher and of lam, which falls linearly, or stays."""

        hint: HintSource = Field(
            default="record",
            description="`{solution}` of data.hint_template. sibling: a correct response of the group; record: its field",
        )
        lam: float = Field(
            default=0.5, ge=0, le=1, description="lam_0, the share of the advantage that the teacher deals out"
        )
        decay_steps: int | None = Field(
            default=50, gt=0, description="RL steps in which lam falls to 0; empty: it stays"
        )
        weight_clip: float = Field(default=0.2, gt=0, description="eps: a token's weight is from 1 - eps to 1 + eps")

    options: Options

    name: ClassVar[str] = "rlsd"  # of its metrics
    towards_teacher: ClassVar[float] = 1.0  # the sign of D
    taught_share: ClassVar[float] = 1.0  # of the sequences, at most

    def __init__(self, config: Config, options: Any, tools: Tools) -> None:
        super().__init__(config, options, tools)
        self._seen: dict[str, float] = {}

    @classmethod
    def costs(cls, config: Config, options: Any) -> Costs:
        """What is taught, as long as lam is above 0."""
        if not options.lam:
            return Costs()
        asked = config.run.steps if options.decay_steps is None else min(options.decay_steps - 1, config.run.steps)
        return Costs(scored=cls.taught_share * asked / max(config.run.steps, 1))

    def weigh(self, batch: TrainBatch, scores: Scores, scoring: Scoring) -> TrainBatch:
        batch, lam = super().weigh(batch, scores, scoring), self._lam(scoring.at.rl_step)
        read = [i for i, s in enumerate(batch.sequences) if lam and s.advantage and s.privileged_token_ids is not None]
        taught = [batch.sequences[i] for i in read]
        teacher = scoring.score(teacher_view(TrainBatch(tuple(taught)))).logprobs
        gaps = [self.towards_teacher * (t - scores.logprobs[i]) for i, t in zip(read, teacher, strict=True)]
        weights = [
            token_weights(s.advantage, gap, clip=self.options.weight_clip) for s, gap in zip(taught, gaps, strict=True)
        ]
        self._seen = {f"{self.name}/{what}": value for what, value in self._measure(lam, gaps, weights).items()}
        self._seen[f"{self.name}/read_fraction"] = len(read) / len(batch)
        sequences = list(batch.sequences)
        for i, s, weight in zip(read, taught, weights, strict=True):
            sequences[i] = replace(s, advantage=np.asarray(s.advantage * (1 - lam + lam * weight), np.float32))
        return TrainBatch(tuple(sequences))

    def metrics(self) -> dict[str, float]:
        return self._seen

    def _lam(self, rl_step: int) -> float:
        o = self.options
        return o.lam if o.decay_steps is None else o.lam * max(0.0, 1 - rl_step / o.decay_steps)

    def _measure(
        self, lam: float, gaps: Sequence[FloatArray], weights: Sequence[NDArray[np.float64]]
    ) -> dict[str, float]:
        """Token means over what the teacher read; without any, there is but `lam`."""
        if not gaps:
            return {"lambda": lam}
        gap, weight, eps = np.concatenate(gaps), np.concatenate(weights), self.options.weight_clip
        return {
            "lambda": lam,
            "log_ratio": float(gap.mean()),
            "weight": float(weight.mean()),
            "clipped_fraction": float(np.mean((weight <= 1 - eps) | (weight >= 1 + eps))),
        }


def token_weights(advantage: float | FloatArray, gap: FloatArray, *, clip: float) -> NDArray[np.float64]:
    """[R] clip(exp(sign(A) D), 1 - clip, 1 + clip), with D the gap."""
    power = np.sign(advantage) * gap.astype(np.float64)
    return np.exp(power.clip(-MAX_LOG_RATIO, MAX_LOG_RATIO)).clip(1 - clip, 1 + clip)
