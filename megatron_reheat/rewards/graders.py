"""The graders by name (`reward.kind`): a response and its prompt's verifier in, 1.0 or 0.0 out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_reheat.rewards.functions import Score
from megatron_reheat.rewards.math import verify_math
from megatron_reheat.rewards.reasoning_gym import verify_reasoning_gym

Grader = Callable[[str, Mapping[str, Any]], float | Score]

GRADERS: dict[str, Callable[[str, Mapping[str, Any]], float]] = {
    "math": verify_math,
    "reasoning_gym": verify_reasoning_gym,
}
