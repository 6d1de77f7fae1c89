"""What the rest of the program knows about a rollout engine: a protocol and the records that cross it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_reheat.types import Completion, SamplingParams


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
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, n: int, seed: int
    ) -> list[list[Completion]]:
        """Samples `n` completions of each prompt, in the order of the prompts.

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
