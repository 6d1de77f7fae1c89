"""RLRT (arXiv 2605.10781): on correct samples, tokens that the policy found more likely than a teacher who knows get more.

    D = log p_policy(y) - log p_teacher(y);   A_t as in RLSD where the sample is correct;   A_t = A where it is not

RLSD with the exponent turned round: what a teacher who was shown a solution would not have written is reasoning of the policy's
own. The teacher is shown the group's first other correct response, and where there is none it is the policy: D = 0. Without the
gate on correctness length and entropy blow up (the paper's ablation), so it is no option.

Hyperparameters: weight_clip 1.0 for base models (a token's weight may be zero), 0.5 for instruct, 0.2 for thinking models; lam
stays for base models and falls over 30 steps for the others. The shape of that decay is not given; it is linear here, as in
RLSD's code. Advantages are normalized (rl.normalize_by_std), and the paper caps importance weights at 2 (rl.tis_cap).
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from megatron_reheat.methods.grpo import ASSUMED_ACCURACY
from megatron_reheat.methods.rlsd import RLSD
from megatron_reheat.types import At, Group, HintSource, TrainSequence


class RLRT(RLSD):
    """RLSD with the sign of D turned, for correct samples; the teacher reads no others."""

    class Options(RLSD.Options):
        """Those of RLSD; defaults are for base models."""

        hint: HintSource = Field(default="sibling", description=RLSD.Options.model_fields["hint"].description)
        decay_steps: int | None = Field(
            default=None, gt=0, description="RL steps in which lam falls to 0; empty: it stays"
        )
        weight_clip: float = Field(default=1.0, gt=0, description="eps: a token's weight is from 1 - eps to 1 + eps")

    name: ClassVar[str] = "rlrt"
    towards_teacher: ClassVar[float] = -1.0
    taught_share: ClassVar[float] = ASSUMED_ACCURACY

    def sequences(self, group: Group, at: At) -> list[TrainSequence]:
        return [
            s if reward.correct else replace(s, privileged_token_ids=None)
            for s, reward in zip(super().sequences(group, at), group.rewards, strict=True)
        ]
