"""S2L-PO: part of each group comes from a smaller frozen model of the same family (arXiv 2605.30789).

Of a group of G, the explorer writes G_w and the policy G_s = G - G_w, the explorer's share falling from all to none:

    RL step i <= T_mix: a = 1 - (i - 1) / (T_mix - 1), G_w = ceil(a G);  later: G_w = 0

Advantages are over the union, so they tell in part which model wrote an answer. Steps are those of RL alone: a warm start or a
round of reheating takes nothing of the schedule.

Explorer rows: as in the released scripts, old log-probabilities are the policy's own, recomputed before the update, so that
the ratio starts at 1 and an explorer's token counts like one of the policy's (the paper's formula divides by what sampled). A
token that the policy would hardly write gets a large gradient all the same: `s2l_po/logprob_gap` shows by how much the two
differ, and `max_gap` leaves out the sequences that are too far away (a sequence's geometric mean ratio, as in rollout
correction). They are outside of TIS, entropy and mismatch.

The KL to the reference model that the paper adds is `rl.kl_coef` (1e-3). Not here: the released scripts' other form, in which
a step is an update on explorer groups alone and then one on the policy's: its second half samples from the policy that the
first half made, so that a step would be two of collecting, scoring and updating, and its two sizes are both rounded up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from pydantic import Field

from megatron_reheat.clock import Clock
from megatron_reheat.config import Config
from megatron_reheat.config_fields import Section, Temperature
from megatron_reheat.methods.grpo import GRPO, Costs, Sampling, Scoring, Tools
from megatron_reheat.types import POLICY, At, Collected, Group, Scores, TrainBatch

EXPLORER = "explorer"


class S2LPO(GRPO):
    """Group size per step: at least one completion of each prompt is the policy's, because the controller reads its entropy
    off them; where the whole group is the explorer's, that one is measured and not trained on."""

    class Options(Section):
        """Of the explorer, whose folder is `rl.samplers.explorer`."""

        mix_steps: int | None = Field(
            default=None, ge=2, description="RL steps until the explorer's share is none; empty: half of run.steps"
        )
        temperature: Temperature = Field(default=0.7, description="of the explorer, as in the released data")
        top_p: float = Field(default=0.95, gt=0, le=1, description="of the explorer, as in the released data")
        max_gap: float | None = Field(
            default=None,
            gt=0,
            description="nats: leave out an explorer's sequence whose tokens are in the mean so much more likely where they "
            "were sampled than under the policy; empty: none",
        )

    samplers = (EXPLORER,)
    options: Options

    def __init__(self, config: Config, options: Options, tools: Tools) -> None:
        super().__init__(config, options, tools)
        self._metrics: dict[str, float] = {}

    @classmethod
    def problems(cls, config: Config, options: Options) -> Iterator[str]:
        if config.rl.max_staleness:
            yield "rl.method s2l_po mixes groups in the step that samples them; set rl.max_staleness=0"

    @classmethod
    def costs(cls, config: Config, options: Options) -> Costs:
        size, steps = config.rl.group_size, max(config.run.steps, 1)
        explored = [explorer_share(i, mix_steps(config, options), size) for i in range(1, steps + 1)]
        own = sum(max(size - n, 1) for n in explored)
        return Costs(sampled=own / (steps * size) - 1, frozen={EXPLORER: sum(explored) / (steps * size)})

    def group_size(self, at: At) -> int:
        return max(self.config.rl.group_size - self._explored(at), 1)

    def collect(self, sampling: Sampling, at: At, clock: Clock) -> Collected:
        size, explored = self.config.rl.group_size, self._explored(at)
        self._metrics = {"s2l_po/explorer_share": explored / size}
        if not explored:
            return sampling.collect(at, clock, group_size=size)
        sampled: list[tuple[Group, Group]] = []

        def complete(groups: Sequence[Group]) -> list[Group]:
            options, prompts = self.options, [g.prompt for g in groups]
            theirs = sampling.again(
                prompts, explored, options.temperature, clock, sampler=EXPLORER, top_p=options.top_p
            )
            sampled.extend(zip(groups, theirs, strict=True))
            return theirs if explored == size else [union(*pair) for pair in zip(groups, theirs, strict=True)]

        collected = sampling.collect(at, clock, group_size=self.group_size(at), complete=complete)
        accuracies = {
            f"s2l_po/{name}_accuracy": float(np.mean([pair[i].accuracy for pair in sampled]))
            for i, name in enumerate(("policy", "explorer"))
        }
        return replace(collected, metrics=collected.metrics | accuracies)

    def weigh(self, batch: TrainBatch, scores: Scores, scoring: Scoring) -> TrainBatch:
        gaps = [
            None if s.completion is None or s.completion.sampler == POLICY else s.completion.rollout_logprobs - own
            for s, own in zip(batch.sequences, scores.logprobs, strict=True)
        ]
        batch = super().weigh(batch, scores, scoring)
        theirs = [gap for gap in gaps if gap is not None]
        if not theirs:
            return batch
        tokens, limit = np.concatenate(theirs).astype(np.float64), self.options.max_gap
        kept = [limit is None or gap is None or float(gap.mean(dtype=np.float64)) <= limit for gap in gaps]
        self._metrics |= {
            "s2l_po/logprob_gap": float(tokens.mean()),
            "s2l_po/logprob_gap_max": float(tokens.max()),
            "s2l_po/rejected_fraction": kept.count(False) / len(theirs),
        }
        return TrainBatch(tuple(s for s, keep in zip(batch.sequences, kept, strict=True) if keep))

    def metrics(self) -> dict[str, float]:
        return self._metrics

    def _explored(self, at: At) -> int:
        return explorer_share(at.rl_step, mix_steps(self.config, self.options), self.config.rl.group_size)


def mix_steps(config: Config, options: S2LPO.Options) -> int:
    """T_mix."""
    return options.mix_steps or max(config.run.steps // 2, 2)


def explorer_share(rl_step: int, mix_steps: int, group_size: int) -> int:
    """G_w of RL step `rl_step`, counted from 1: ceil(a G), in whole numbers, so that no rounding error makes one more of it."""
    return max(-(-group_size * (mix_steps - rl_step) // (mix_steps - 1)), 0)


def union(own: Group, theirs: Group) -> Group:
    """One group of both, the policy's completions first."""
    return Group(own.prompt, own.completions + theirs.completions, own.rewards + theirs.rewards)
