"""DPPO, Divergence Proximal Policy Optimization (arXiv 2602.04879, section 4): the trust region is a divergence, not a ratio.

    loss = -mask r A        r = pi / mu, mu the policy that sampled
    mask = 0 where A > 0, pi > mu and D(mu, pi) > delta_high, or A < 0, pi < mu and D > delta_low; else 1

D is the total variation |pi - mu| or the KL between two coins that show the sampled token or another (equations 13 and 14).
delta is 0.15 for tv and 0.05 for kl (verl's run_qwen30b_dppo.sh; SkyRL's default is 0.2). Anchored at the policy that sampled,
not at the trainer's recomputed one (section 5.2): the ratio then corrects for the sampler itself. The authors' code takes the
gradient through log pi, with the ratio detached and capped: the same gradient below that cap.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from pydantic import Field

from megatron_reheat.config import Config
from megatron_reheat.config_fields import Section
from megatron_reheat.losses.policy_gradient import SurrogateLoss
from megatron_reheat.losses.surrogates import Divergence, divergence_masked
from megatron_reheat.methods.grpo import GRPO

DELTAS = {"tv": 0.15, "kl": 0.05}


class DPPO(GRPO):
    """`rl.clip_low`, `rl.clip_high` and `rl.dual_clip` are of the ratio, and are not read."""

    class Options(Section):
        """A bound that is left empty is that of `DELTAS`."""

        divergence: Divergence = Field(default="tv", description="tv: total variation; kl: of two coins")
        delta_low: float | None = Field(default=None, gt=0, description="for A < 0; empty: 0.15 of tv, 0.05 nats of kl")
        delta_high: float | None = Field(default=None, gt=0, description="for A > 0; empty: the same")

    anchored_at_sampler = True

    @classmethod
    def problems(cls, config: Config, options: Any) -> Iterator[str]:
        if config.rl.tis_cap is not None:
            yield "rl.method dppo takes the ratio to the policy that sampled, which corrects for it: leave rl.tis_cap empty"

    def surrogate(self) -> SurrogateLoss:
        o = self.options
        low, high = (DELTAS[o.divergence] if delta is None else delta for delta in (o.delta_low, o.delta_high))
        return partial(divergence_masked, divergence=o.divergence, delta_low=low, delta_high=high)
