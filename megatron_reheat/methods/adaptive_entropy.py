"""An entropy bonus whose coefficient follows a target (Skywork-OR1, arXiv 2505.22312, section 3: adaptive entropy control).

    alpha_k = c_k if e_k <= target else 0
    c_k+1   = c_k + delta if e_k <= target else c_k - delta,        kept between coef_min and coef_max

e_k is the entropy of the tokens that step k trains on, token mean in nats at temperature 1, before its first update; c_0 is
`rl.entropy_coef`. delta 0.005 and target 0.2 are the paper's and TRL's (use_adaptive_entropy), whose gate reads the
entropy of the optimizer step before, as does that of the authors' code. Their released scripts move c by 1e-4 and keep it
between 0 and 5e-3. c_k is part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

from megatron_reheat.config import Config
from megatron_reheat.config_fields import Section
from megatron_reheat.methods.grpo import GRPO, Scoring, Tools
from megatron_reheat.types import Scores, TrainBatch


class AdaptiveEntropy(GRPO):
    """GRPO with an `entropy_coef` that is chosen anew each step; c begins as `rl.entropy_coef`."""

    class Options(Section):
        """Target and delta are the paper's; the bounds are those of c, whatever is applied."""

        target: float = Field(default=0.2, gt=0, description="nats; the bonus is there at or below it only")
        delta: float = Field(default=0.005, gt=0, description="what the coefficient moves by each step")
        coef_min: float = Field(default=0.0, ge=0, description="the coefficient falls no further")
        coef_max: float = Field(default=1.0, gt=0, description="and rises no further")

    def __init__(self, config: Config, options: Any, tools: Tools) -> None:
        super().__init__(config, options, tools)
        self._next = config.rl.entropy_coef
        self._applied = 0.0

    @classmethod
    def problems(cls, config: Config, options: Any) -> Iterator[str]:
        if not options.coef_min <= config.rl.entropy_coef <= options.coef_max:
            yield (
                f"rl.entropy_coef {config.rl.entropy_coef:g}, with which the coefficient begins, is not between "
                f"rl.options.coef_min {options.coef_min:g} and rl.options.coef_max {options.coef_max:g}; change one of them"
            )

    @property
    def entropy_coef(self) -> float:
        return self._applied

    def weigh(self, batch: TrainBatch, scores: Scores, scoring: Scoring) -> TrainBatch:
        """Once a step, before its loss is asked for."""
        is_low = scores.of(batch).mean_entropy <= self.options.target
        self._applied = self._next if is_low else 0.0
        moved = self._next + (self.options.delta if is_low else -self.options.delta)
        self._next = min(max(moved, self.options.coef_min), self.options.coef_max)
        return super().weigh(batch, scores, scoring)

    def metrics(self) -> dict[str, float]:
        return {"adaptive_entropy/applied_coef": self._applied, "adaptive_entropy/next_coef": self._next}

    def state(self) -> dict[str, Any]:
        return {"coef": self._next}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._next = float(state["coef"])
