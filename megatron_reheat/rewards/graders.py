"""The graders by name (`reward.kind`): a response and its prompt's verifier in, 1.0 or 0.0 out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from megatron_reheat.errors import ConfigError
from megatron_reheat.rewards.functions import Score, check_functions

if TYPE_CHECKING:
    from megatron_reheat.config import RewardConfig

Grader = Callable[[str, Mapping[str, Any]], float | Score]

# reward.kind -> the grader, the module that it needs, and the package of that
_GRADERS = {
    "math": ("math:verify_math", "math_verify", "math-verify[antlr4_13_2]"),
    "reasoning_gym": ("reasoning_gym:verify_reasoning_gym", "reasoning_gym", "reasoning-gym"),
}


def grader_of(kind: str) -> Callable[[str, Mapping[str, Any]], float]:
    """Imports what it needs, which takes seconds."""
    module, _, name = _GRADERS[kind][0].partition(":")
    return getattr(import_module(f"megatron_reheat.rewards.{module}"), name)


def check_reward(config: RewardConfig) -> None:
    """Whether a grader can be had here, before anything is started.

    Raises:
        ConfigError: a package is missing, or a function of the user's own.
    """
    check_functions(config.function or ())
    if config.kind in _GRADERS:
        _, module, package = _GRADERS[config.kind]
        if find_spec(module) is None:
            raise ConfigError(f"reward.kind={config.kind} needs {package.partition('[')[0]}; pip install '{package}'")
