"""GSPO, Group Sequence Policy Optimization (arXiv 2507.18071, section 4): the ratio and its clip are the response's, not the
token's.

    s_i  = (pi(y_i) / pi_old(y_i))^(1 / |y_i|) = exp(1/|y_i| sum_t log(pi / pi_old))
    loss = -1/G sum_i min(s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i)

eps_low 3e-4 and eps_high 4e-4, and four minibatches a step, are the paper's (section 5.1). GSPO-token (section 4.3) with the
same advantage at every token of a response is the same function; the loss is written in its form. verl's "gspo" is that too,
with log s bounded by 10 where ours is by 20 in each token; TRL's is importance_sampling_level="sequence".

With `rl.tis_cap`, for a sampler that is not the old policy (`rollout.overlap`, or an engine that computes otherwise), response
i counts by

    w_i = min((pi_old(y_i) / mu(y_i))^(1 / |y_i|), tis_cap)              mu the policy that sampled

so that w_i s_i is its ratio to mu, made of it as s_i is of the ratio to pi_old. This is our reading: the paper has one old
policy. verl's weight of a whole response is not normalized by its length, so that it vanishes or is truncated on long ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from megatron_reheat.config import Config
from megatron_reheat.config_fields import Section
from megatron_reheat.losses.policy_gradient import SurrogateLoss
from megatron_reheat.losses.surrogates import response_importance, sequence_clipped
from megatron_reheat.methods.grpo import GRPO
from megatron_reheat.parallel.packing import MicroBatch


class GSPO(GRPO):
    """`rl.clip_low`, `rl.clip_high` and `rl.dual_clip` are of a token's ratio, and are not read."""

    class Options(Section):
        """Defaults are the paper's (section 5.1)."""

        clip_low: float = Field(default=3e-4, gt=0, lt=1, description="the response's ratio is at least 1 - clip_low")
        clip_high: float = Field(default=4e-4, gt=0, description="and at most 1 + clip_high")

    whole_sequences: ClassVar[bool] = True

    @classmethod
    def problems(cls, config: Config, options: Any) -> Iterator[str]:
        if config.rl.aggregation != "sequence_mean":
            yield "rl.method gspo weighs every response the same: set rl.aggregation=sequence_mean"

    def surrogate(self) -> SurrogateLoss:
        return partial(sequence_clipped, clip_low=self.options.clip_low, clip_high=self.options.clip_high)

    def importance(self, micro: MicroBatch) -> Tensor:
        return response_importance(micro)
