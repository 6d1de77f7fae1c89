"""KL-Cov (arXiv 2505.22617, section 4.2): the tokens that would lower the entropy most are held at the old policy.

    loss = -r A                                     r = pi / pi_old, not clipped
         + beta |log r|   of the k N tokens of the largest covariance (`methods.covariance`)

The paper writes beta KL(pi_old || pi); its code, and verl's, estimates that by the sampled token's |log r|, and so do we. At
r = 1 that has no gradient: the penalty acts from the second minibatch of a step on. k is 2e-3 for the paper's 7B model and 2e-4
for 32B, beta is 1.
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
from megatron_reheat.losses.surrogates import selected_held
from megatron_reheat.methods.covariance import CovarianceMethod
from megatron_reheat.types import FloatArray


class KLCov(CovarianceMethod):
    """`rl.clip_low`, `rl.clip_high` and `rl.dual_clip` are a clip's, and are not read."""

    class Options(Section):
        """Defaults are the paper's for its 32B model; for 7B, its `fraction` is 2e-3."""

        fraction: float = Field(default=2e-4, gt=0, le=1, description="k: tokens that are held, of all; at least one")
        beta: float = Field(default=1.0, gt=0, description="of the penalty on |log(pi / pi_old)|")

    @classmethod
    def problems(cls, config: Config, options: Any) -> Iterator[str]:
        if config.rl.minibatch_prompts in (None, config.rl.prompts_per_step):
            yield (
                "rl.method kl_cov penalises leaving the old policy, which a step of one minibatch does not do: set "
                f"rl.minibatch_prompts below rl.prompts_per_step {config.rl.prompts_per_step}"
            )

    def select(self, covariances: FloatArray) -> np.ndarray:
        return np.argsort(-covariances, kind="stable")[: self.budget(len(covariances))]

    def surrogate(self) -> SurrogateLoss:
        return partial(selected_held, coef=self.options.beta)
