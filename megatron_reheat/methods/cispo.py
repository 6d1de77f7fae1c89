"""CISPO (MiniMax-M1, arXiv 2506.13585, section 3.1): the importance weight is clipped and detached, the token never dropped.

    loss = -1/sum|o| sum sg(clip(r, 1 - eps_low, 1 + eps_high)) A log pi        r = pi / pi_old

The paper sets no lower bound ("a large value") and does not tell its eps_high; the defaults are ScaleRL's (arXiv 2510.13786):
the weight lies between 0 and 5. TRL's epsilon_high is that bound itself (5), SkyRL's and ours what it is above 1 (4). verl
clips with the actor's clip_ratio_low and clip_ratio_high, which are 0.2 unless set.
"""

from __future__ import annotations

from functools import partial

from pydantic import Field

from megatron_reheat.config_fields import Section
from megatron_reheat.losses.policy_gradient import SurrogateLoss
from megatron_reheat.losses.surrogates import weight_clipped
from megatron_reheat.methods.grpo import GRPO


class CISPO(GRPO):
    """`rl.clip_low`, `rl.clip_high` and `rl.dual_clip` are PPO's, and are not read."""

    class Options(Section):
        """Defaults are ScaleRL's."""

        eps_low: float = Field(default=1.0, gt=0, le=1, description="the weight is at least 1 - eps_low; 1: no bound")
        eps_high: float = Field(default=4.0, gt=0, description="the weight is at most 1 + eps_high")

    def surrogate(self) -> SurrogateLoss:
        return partial(weight_clipped, eps_low=self.options.eps_low, eps_high=self.options.eps_high)
