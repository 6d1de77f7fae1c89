"""What every stage's step returns, and the two conversions all stages share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_reheat.types import Completion, Group, Prompt, TrainSequence


@dataclass(frozen=True)
class StepOutcome:
    """`entropy` is the token mean over the step's rollouts in nats, None if there was nothing to measure it on."""

    metrics: dict[str, float]
    groups: Sequence[Group]
    entropy: float | None
    applied: bool
    finite: bool = True


def derive_seed(*parts: int) -> int:
    """A sampling seed from run seed, step and whatever else tells one draw from another; stable across machines."""
    return int(np.random.SeedSequence(parts).generate_state(1, dtype=np.uint32)[0])


def sequence_of(prompt: Prompt, completion: Completion) -> TrainSequence:
    """Prompt and response as one training sequence."""
    return TrainSequence(
        token_ids=np.concatenate([np.asarray(prompt.token_ids, dtype=np.int32), completion.token_ids]),
        num_prompt_tokens=len(prompt.token_ids),
        rollout_logprobs=completion.rollout_logprobs,
    )
