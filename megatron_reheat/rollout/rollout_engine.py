"""What the rest of the program knows about a rollout engine: a protocol and the records that cross it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_reheat.types import Completion, SamplingParams

# called with the position of the prompt, that of the sample among its own, and the completion
OnFinished = Callable[[int, int, Completion], None]


@dataclass(frozen=True)
class SyncReport:
    """One weight sync as the engine confirmed it. `verified`: digests of every tensor were compared on both ends."""

    version: int
    num_tensors: int
    num_bytes: int
    seconds: float
    verified: bool


class RolloutEngine(Protocol):
    """Samples completions from one copy of the policy."""

    @property
    def policy_version(self) -> int | None:
        """Version of the weights the engine confirmed last; None before the first sync and after a failed one."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        n: int,
        seed: int,
        on_finished: OnFinished | None = None,
    ) -> list[list[Completion]]:
        """Samples `n` completions of each prompt, in the order of the prompts.

        `on_finished` is called in this thread with each completion as soon as it is finished, in whatever order; of a call
        that raises, with some of them. What is sampled is the same with it and without.

        Raises:
            ConfigError: for a prompt or a setting that cannot be served, naming the prompt's position.
            WeightSyncError: when the engine holds no usable weights.
            EngineDied: when the engine ended or did not answer in time.
        """
        ...

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int, verify: bool) -> SyncReport:
        """Replaces every weight by Hugging Face named tensors.

        `tensors` is always consumed to its end, on failure too, because producing it may be a collective.

        Raises:
            WeightSyncError: naming the tensors; the engine then refuses to generate until a sync succeeds.
            EngineDied: when the engine ended or did not answer in time.
        """
        ...

    def wait_ready(self) -> float:
        """Waits until the engine can serve; returns the seconds from its start until it could.

        Raises:
            EngineDied: when it ended, or was not ready within `rollout.start_timeout_s`.
        """
        ...

    def restart(self) -> None:
        """Replaces what died; weights must be sent again before anything is sampled.

        Raises:
            EngineDied: after `rollout.max_restarts` restarts.
        """
        ...

    def sleep(self) -> None:
        """Gives accelerator memory back; a weight sync must follow `wake` if weights were dropped."""
        ...

    def wake(self) -> None:
        """Takes back the memory that `sleep` gave away; nothing where the engine is awake."""
        ...

    def close(self) -> None:
        """Ends the engine; safe to call twice."""
        ...
