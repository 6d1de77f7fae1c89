"""SDPG: policy gradient, distillation from the policy's privileged self, and an anchor to the policy RL began with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from pydantic import Field

from megatron_reheat.config import Config
from megatron_reheat.losses.policy_gradient import REF_LOGPROBS
from megatron_reheat.losses.sdpg import HINTED, TEACHER, Anchor, sdpg_loss
from megatron_reheat.methods.grpo import ASSUMED_ACCURACY, GRPO, Costs, Scoring
from megatron_reheat.methods.privileged import Privileged
from megatron_reheat.methods.readings import reading_problems
from megatron_reheat.parallel.packing import Loss
from megatron_reheat.types import At, Group, Scores, TrainBatch, TrainSequence


class SDPG(Privileged):
    """SDPG (arXiv 2606.04036). With p the policy, u its detached self behind the teacher's prompt (`data.hint_template`), both
    over the whole vocabulary and at the weights of this optimizer step, w = pi / pi_ref of the sampled token, and k the step
    of RL in this run from 1:

        L = L_GRPO + beta(k) mean 1[A > 0] KL(p || u) + alpha mean f(w)
        beta(k) = beta min(1, k / warmup_steps) min(1, (T - k) / decay_steps)
        f: UFKL 1/w + log w    URKL (log w)^2 / 2    FKL 1/w    RKL (log w + 1)^2 / 2

    Means are over tokens as `rl.aggregation` has them (the paper's: token_mean). L_GRPO is the clipped surrogate, which the
    paper uses for several minibatches and whose gradient strictly on-policy is that of its -A log pi. For several minibatches
    the paper also multiplies the other two terms by sg(pi / pi_old) while the authors' code does not: `importance_weighted`.
    From the code come the bounds, 20 nats on a token's KL and +-20 on log w, and that `rl.tis_cap` weighs all three terms.

    Our reading: all distributions are those that sample, at `rollout.temperature`; a sequence without a hint is not distilled,
    since its teacher reads what the policy read. The paper distils the KL that starts at the student, which is the reverse
    one, whatever its code's comments call it. The gate and the schedule are the paper's; the authors' scripts have neither
    (`gate: false`, `warmup_steps: 0`, `decay_steps: 0`).
    """

    class Options(Privileged.Options):
        """`beta` to `gate` are the distillation's, `alpha` and `anchor` the anchor's."""

        beta: float = Field(default=1e-3, gt=0, description="of the distillation, at its highest")
        warmup_steps: int = Field(default=50, ge=0, description="RL steps in which beta rises from 0; 0: none")
        decay_steps: int = Field(default=350, ge=0, description="RL steps in which it falls to 0 at the end; 0: none")
        total_steps: int | None = Field(default=None, gt=0, description="T, where it ends; empty: run.steps")
        gate: bool = Field(default=True, description="distil only responses of positive advantage")
        alpha: float = Field(default=1e-3, ge=0, description="of the anchor; 0: no reference policy")
        anchor: Anchor = Field(default="UFKL", description="f of the docstring: UFKL, URKL, FKL or RKL")
        importance_weighted: bool = Field(default=True, description="both terms times sg(pi / pi_old), as in the paper")

    options: Options
    loss_keys = GRPO.loss_keys  # its loss is GRPO's, and more

    _hinted = 0.0  # the fraction of the step's sequences whose teacher knew more
    _beta = 0.0

    @classmethod
    def problems(cls, config: Config, options: Any) -> Iterator[str]:
        yield from super().problems(config, options)
        yield from reading_problems(config)
        total, ramps = _total_steps(config, options), options.warmup_steps + options.decay_steps
        if ramps > total:
            key = "run.steps" if options.total_steps is None else "rl.options.total_steps"
            yield (
                f"rl.options.warmup_steps {options.warmup_steps} + decay_steps {options.decay_steps} exceed {key} {total}, so "
                "that beta never reaches rl.options.beta; lower them in proportion"
            )
        if options.alpha and config.rl.kl_coef:
            yield (
                "rl.kl_coef and rl.options.alpha both hold the policy near the one RL began with; set rl.kl_coef=0, or "
                "rl.options.alpha=0"
            )

    @classmethod
    def needs_reference(cls, config: Config, options: Any) -> bool:
        return options.alpha > 0 or super().needs_reference(config, options)

    @classmethod
    def costs(cls, config: Config, options: Any) -> Costs:
        """Right answers are those of positive advantage."""
        return Costs(read=ASSUMED_ACCURACY if options.gate else 1.0)

    def sequences(self, group: Group, at: At) -> list[TrainSequence]:
        return [
            replace(s, extra={**s.extra, HINTED: np.full(s.num_response_tokens, float(_is_hinted(s)), np.float32)})
            for s in super().sequences(group, at)
        ]

    def weigh(self, batch: TrainBatch, scores: Scores, scoring: Scoring) -> TrainBatch:
        batch = super().weigh(batch, scores, scoring)
        self._hinted = sum(map(_is_hinted, batch.sequences)) / len(batch)
        return batch.with_extra(REF_LOGPROBS, scoring.reference(batch).logprobs) if self.options.alpha else batch

    def views(self, minibatch: TrainBatch) -> Mapping[str, TrainBatch]:
        """The teacher reads what is distilled."""
        return {TEACHER: TrainBatch(tuple(map(self._as_taught, minibatch.sequences)))}

    def _as_taught(self, sequence: TrainSequence) -> TrainSequence:
        hinted = sequence.privileged_token_ids
        if hinted is None or (self.options.gate and not np.any(np.asarray(sequence.advantage) > 0)):
            return sequence.left_out()
        return sequence.behind(hinted)

    def loss(self, at: At) -> Loss:
        o = self.options
        self._beta = self.beta(at.rl_step)
        return partial(
            sdpg_loss,
            policy=super().loss(at),
            surrogate=self.surrogate(),
            temperature=at.temperature,
            beta=self._beta,
            gate=o.gate,
            alpha=o.alpha,
            anchor=o.anchor,
            importance_weighted=o.importance_weighted,
        )

    def beta(self, rl_step: int) -> float:
        """beta(k); 0 from T on."""
        o = self.options
        left = max(_total_steps(self.config, o) - rl_step, 0)
        rising = min(1.0, rl_step / o.warmup_steps) if o.warmup_steps else 1.0
        falling = min(1.0, left / o.decay_steps) if o.decay_steps else 1.0
        return o.beta * rising * falling

    def metrics(self) -> dict[str, float]:
        return {**super().metrics(), "sdpg/beta": self._beta, "sdpg/hinted_fraction": self._hinted}


def _total_steps(config: Config, options: Any) -> int:
    return config.run.steps if options.total_steps is None else options.total_steps


def _is_hinted(sequence: TrainSequence) -> bool:
    return sequence.privileged_token_ids is not None
