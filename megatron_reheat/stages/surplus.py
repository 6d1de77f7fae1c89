"""Groups that a step had too many of, kept for the next steps as long as the policy that sampled them is recent enough."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_reheat.types import POLICY, Completion, Group, Prompt, Reward


@dataclass(frozen=True)
class SampledAs:
    """What a step samples with; groups that were sampled otherwise are of no use to it."""

    group_size: int
    temperature: float


class Surplus:
    """Graded groups, the oldest first."""

    def __init__(self, max_staleness: int) -> None:
        """`max_staleness` is in updates of the policy (`policy_version`); with 0 nothing is taken from a saved state."""
        self._max_staleness = max_staleness
        self._kept: list[tuple[SampledAs, Group]] = []

    def fresh(self, sampled_as: SampledAs, version: int) -> list[Group]:
        """Those of use to a step of the policy `version`."""
        return [
            group
            for kept_as, group in self._kept
            if kept_as == sampled_as and version - _version(group, version) <= self._max_staleness
        ]

    def replace(self, sampled_as: SampledAs, groups: Sequence[Group]) -> None:
        """Keeps these in place of what there was."""
        self._kept = [(sampled_as, group) for group in groups]

    def __len__(self) -> int:
        return len(self._kept)

    def forget(self) -> None:
        """Other weights come next than those that follow from what was sampled."""
        self._kept = []

    def state(self) -> list[dict[str, Any]]:
        """Plain JSON, exact to the bit; prompts by their index."""
        return [asdict(kept_as) | _to_json(group) for kept_as, group in self._kept]

    def load_state(self, state: Sequence[dict[str, Any]], prompts: Callable[[Sequence[int]], Sequence[Prompt]]) -> None:
        """Goes on from what `state` returned; `prompts` gives those at these places in the data."""
        self._kept = []
        if self._max_staleness:
            found = prompts([kept["prompt"] for kept in state])
            for kept, prompt in zip(state, found, strict=True):
                self._kept.append((SampledAs(kept["group_size"], kept["temperature"]), _from_json(kept, prompt)))


def _version(group: Group, default: int) -> int:
    """Of the policy that sampled it; `default` where none of it is the policy's."""
    return min((c.policy_version for c in group.completions if c.sampler == POLICY), default=default)


def _to_json(group: Group) -> dict[str, Any]:
    completions = [
        {**vars(c), "token_ids": _packed(c.token_ids, "<i4"), "rollout_logprobs": _packed(c.rollout_logprobs, "<f4")}
        for c in group.completions
    ]
    return {
        "prompt": group.prompt.index,
        "completions": completions,
        "rewards": [{**vars(r), "parts": dict(r.parts)} for r in group.rewards],
    }


def _from_json(kept: dict[str, Any], prompt: Prompt) -> Group:
    completions = [
        Completion(
            **{
                **c,
                "token_ids": _unpacked(c["token_ids"], "<i4"),
                "rollout_logprobs": _unpacked(c["rollout_logprobs"], "<f4"),
            }
        )
        for c in kept["completions"]
    ]
    return Group(prompt, tuple(completions), tuple(Reward(**r) for r in kept["rewards"]))


def _packed(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode()


def _unpacked(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).astype(dtype[1:])
