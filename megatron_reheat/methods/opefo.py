"""OPEFO (arXiv 2605.11491): tokens whose update raises the entropy and tokens whose update lowers it are weighed to balance.

With p the probability of the sampled token, H the entropy at its position and A its advantage, the entropy's first-order change

    proxy:  dH = -A (1 - p)^2 (log p + H)
    exact:  dH = -A [p (log p + H) - sum_v p_v^2 (log p_v + H)]

gives, with P the sum of the positive dH of the whole batch and N that of the negative ones' sizes,

    lam = (N - P) / (N + P);   A <- (1 + lam) A where dH > 0,  (1 - lam) A where dH < 0

so that the predicted changes add up to zero. All of it is constant in the loss, which is GRPO's otherwise. Strictly on-policy:
one update per rollout, in which the ratio is one.

Our reading: the paper's printed equation was reconstructed from its numerical example and applied to each sampled token; it is
a heuristic (its sign agrees with the exact change in about five of six random cases). `exact` is that change for a
tabular softmax, not the paper's. A token's dH counts with its share in the loss, which under a token mean is the same for all.
The paper reports lam of about 0.001; on a small policy that errs a lot it is 0.6 and more here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from megatron_reheat.config import Config
from megatron_reheat.config_fields import Section
from megatron_reheat.methods.grpo import GRPO, Scoring, Tools
from megatron_reheat.parallel.vocab import Vocabulary
from megatron_reheat.types import FloatArray, Scores, TrainBatch, TrainSequence

MEAN_FLOW = "mean_entropy_flow"


class OPEFO(GRPO):
    """GRPO with advantages per token, weighed by one lam for the whole step."""

    class Options(Section):
        """How the entropy's change is predicted."""

        variant: Literal["proxy", "exact"] = Field(
            default="proxy",
            description="proxy: the paper's estimate of the entropy's change; exact: that of a tabular softmax",
        )

    options: Options

    def __init__(self, config: Config, options: Any, tools: Tools) -> None:
        super().__init__(config, options, tools)
        if options.variant == "exact":
            self.columns = {MEAN_FLOW: Vocabulary.mean_entropy_flow}
        self._seen: dict[str, float] = {}

    @classmethod
    def problems(cls, config: Config, options: Any) -> Iterator[str]:
        rl = config.rl
        if rl.minibatch_prompts not in (None, rl.prompts_per_step):
            yield "rl.method opefo is strictly on-policy, one update per rollout; leave rl.minibatch_prompts empty"
        if config.rollout.overlap:
            yield "rl.method opefo is strictly on-policy, and rollout.overlap samples a step ahead; set it to false"
        if config.rl.max_staleness:
            yield "rl.method opefo is strictly on-policy, and rl.max_staleness trains on what an older one sampled; set it to 0"
        if config.rollout.temperature != 1:
            yield (
                f"rl.method opefo predicts the entropy's change at temperature 1, and rollout.temperature is "
                f"{config.rollout.temperature:g}; set it to 1"
            )
        if config.controller.action == "rollout_temperature":
            yield (
                "rl.method opefo predicts the entropy's change at temperature 1, which controller.action=rollout_temperature "
                "leaves; choose another action"
            )

    def weigh(self, batch: TrainBatch, scores: Scores, scoring: Scoring) -> TrainBatch:
        batch = super().weigh(batch, scores, scoring)
        mean_flows = scores.columns.get(MEAN_FLOW, [None] * len(batch))
        rows = zip(batch.sequences, scores.logprobs, scores.entropies, mean_flows, strict=True)
        changes = [entropy_change(s.advantage, lp, h, flow) for s, lp, h, flow in rows]
        shares = [c / len(c) if self.config.rl.aggregation == "sequence_mean" else c for c in changes if len(c)]
        change = np.concatenate(shares)
        up, down = float(change[change > 0].sum()), float(-change[change < 0].sum())
        lam = (down - up) / (down + up) if down + up > 0 else 0.0
        self._seen = {
            "opefo/lambda": lam,
            "opefo/raising_fraction": float(np.mean(change > 0)),
            "opefo/raised": up,
            "opefo/lowered": down,
        }
        return TrainBatch(tuple(_weighed(s, c, lam) for s, c in zip(batch.sequences, changes, strict=True)))

    def metrics(self) -> dict[str, float]:
        return self._seen


def entropy_change(
    advantage: float | FloatArray, logprobs: FloatArray, entropies: FloatArray, mean_flow: FloatArray | None = None
) -> NDArray[np.float64]:
    """[R] dH of each token but for the learning rate: exact where the mean flow is given, else the proxy."""
    logprobs, entropies = logprobs.astype(np.float64), entropies.astype(np.float64)
    surplus, p = logprobs + entropies, np.exp(logprobs)
    flow = (1 - p) ** 2 * surplus if mean_flow is None else p * surplus - mean_flow
    return -np.asarray(advantage, np.float64) * flow


def _weighed(sequence: TrainSequence, change: NDArray[np.float64], lam: float) -> TrainSequence:
    advantage = np.asarray(sequence.advantage * (1 + lam * np.sign(change)), np.float32)
    return replace(sequence, advantage=advantage)
