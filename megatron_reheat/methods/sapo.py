"""SAPO, Soft Adaptive Policy Optimization (arXiv 2511.20347, section 3): a smooth gate instead of a clip.

    loss = -1/G sum_i 1/|y_i| sum_t f(r) A        f(r) = 4/tau sigmoid(tau (r - 1)),  r = pi / pi_old

tau is 1.0 where A > 0 and 1.05 elsewhere: negative tokens, which push up what was not sampled, fade sooner. The paper averages
responses (rl.aggregation=sequence_mean), as do TRL and, whatever its loss_agg_mode says, verl; here both are possible.
"""

from __future__ import annotations

from functools import partial

from pydantic import Field

from megatron_reheat.config_fields import Section
from megatron_reheat.losses.policy_gradient import SurrogateLoss
from megatron_reheat.losses.surrogates import softly_gated
from megatron_reheat.methods.grpo import GRPO


class SAPO(GRPO):
    """`rl.clip_low`, `rl.clip_high` and `rl.dual_clip` are a clip's, and are not read."""

    class Options(Section):
        """The larger tau, the sooner a token fades whose ratio leaves 1."""

        tau_positive: float = Field(default=1.0, gt=0, description="the gate's temperature for positive advantages")
        tau_negative: float = Field(default=1.05, gt=0, description="and for negative ones")

    def surrogate(self) -> SurrogateLoss:
        return partial(softly_gated, tau_positive=self.options.tau_positive, tau_negative=self.options.tau_negative)
