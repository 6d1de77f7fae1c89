"""What every stage's step returns, and the seeds they draw with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_reheat.stages.controller import Verdict
from megatron_reheat.types import At, Group


@dataclass(frozen=True)
class StepOutcome:
    """`entropy` is the token mean over the step's rollouts in nats, None if there was nothing to measure it on.

    `rolled_back` says that earlier weights were put back. `sampled` are the groups of the first generation batch, all of them.
    """

    metrics: dict[str, float]
    groups: Sequence[Group]
    entropy: float | None
    applied: bool
    finite: bool = True
    rolled_back: bool = False
    sampled: Sequence[Group] = ()


class Stage(Protocol):
    """What a run's steps are made by."""

    def step(self, at: At) -> tuple[StepOutcome, Verdict]:
        """One step, and where the controller takes the run from there. A collective over all ranks."""
        ...


def derive_seed(*parts: int) -> int:
    """A sampling seed from run seed, step and whatever else tells one draw from another; stable across machines."""
    return int(np.random.SeedSequence(parts).generate_state(1, dtype=np.uint32)[0])
