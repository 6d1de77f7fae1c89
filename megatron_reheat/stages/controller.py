"""Decides between RL and reheating from the policy's entropy. The only part that knows both stages exist.

    RL --(smoothed entropy < collapse_below)--> REHEAT --(entropy > reheat_to, or max_reheat_steps)--> RL

`controller.action` may put something else in reheating's place, or have it the other way round: `cool` begins above
`cool_above` and ends below `cool_to`.

The useful window of reheating is narrow: a few steps too many and entropy runs away (arXiv 2606.00755, section 5). So the
verdict on a reheating step falls after its rollouts are measured and before its update is applied.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from megatron_reheat.config import ControllerConfig


class Verdict(StrEnum):
    """Of RL one of the first five; of reheating CONTINUE or one of the last four, which lead back to RL."""

    CONTINUE = "continue"
    ENTER_REHEAT = "enter_reheat"
    RAISE_TEMPERATURE = "raise_temperature"
    FLATTEN = "flatten"
    STOP = "stop"
    TARGET_REACHED = "target_reached"
    STEP_CAP = "step_cap"
    NOT_COLLAPSED = "not_collapsed"
    RUNAWAY = "runaway"


@dataclass
class ControllerState:
    """Everything that must survive a restart. `stage_steps` counts steps since the stage began, `cooling` tells that this
    RL stage came after reheating, and `round` counts the rounds in which there was something to reheat."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)  # as read from a checkpoint

    stage: Literal["rlvr", "reheat"] = "rlvr"
    round: int = 0
    stage_steps: int = 0
    cooling: bool = False
    recent_entropies: list[float] = field(default_factory=list)
    temperature_raised: bool = False
    stopped: bool = False

    def to_json(self) -> dict[str, Any]:
        """As a checkpoint keeps it: the fields by name."""
        return asdict(self)


class Controller:
    """A pure state machine: entropies in, verdicts out; `enter` and `leave` carry them out on the state."""

    def __init__(self, config: ControllerConfig, state: ControllerState | None = None) -> None:
        self.config = config
        self.state = state or ControllerState()

    @property
    def smoothed_entropy(self) -> float:
        """Mean over the last `smoothing_steps` steps of the stage, in nats; NaN before the first."""
        recent = self.state.recent_entropies
        return math.fsum(recent) / len(recent) if recent else math.nan

    def observe_rl(self, entropy: float) -> Verdict:
        """Called once per RL step with the token-mean entropy of its rollouts."""
        self._remember(entropy)
        return self.judge_rl()

    def judge_rl(self) -> Verdict:
        """What the entropies seen so far call for; asked on its own when a run starts from another's checkpoint."""
        config, state = self.config, self.state
        if config.action == "none" or len(state.recent_entropies) < config.smoothing_steps:
            return Verdict.CONTINUE
        if state.cooling and state.stage_steps < config.cooldown_steps:
            return Verdict.CONTINUE
        if not self._is_called_for():
            return Verdict.CONTINUE
        match config.action:
            case "stop":
                return Verdict.STOP
            case "rollout_temperature":
                return Verdict.CONTINUE if state.temperature_raised else Verdict.RAISE_TEMPERATURE
            case action:
                again = Verdict.FLATTEN if action == "flatten" else Verdict.ENTER_REHEAT
                return again if state.round < config.max_rounds else Verdict.CONTINUE

    def judge_reheat(self, entropy: float) -> Verdict:
        """Called once per reheating step, before its update; only CONTINUE lets the update through."""
        config, state = self.config, self.state
        previous = state.recent_entropies[-1] if state.recent_entropies else None
        jumped = previous is not None and entropy - previous > config.runaway_jump
        first = state.stage_steps == 0
        self._remember(entropy)
        # what is cooled may begin above any limit
        too_high = not (math.isfinite(entropy) if self._cools else entropy <= config.runaway_entropy)
        if not first and (too_high or jumped):
            return Verdict.RUNAWAY
        if self._is_at_target(entropy):
            return Verdict.NOT_COLLAPSED if first else Verdict.TARGET_REACHED
        if state.stage_steps > config.max_reheat_steps:
            return Verdict.STEP_CAP
        return Verdict.CONTINUE

    @property
    def _cools(self) -> bool:
        return self.config.action == "cool"

    def _is_called_for(self) -> bool:
        if self._cools:
            assert self.config.cool_above is not None
            return self.smoothed_entropy > self.config.cool_above
        return self.smoothed_entropy < self.config.collapse_below

    def _is_at_target(self, entropy: float) -> bool:
        """So is an entropy that is no number: no step may follow it."""
        if self._cools:
            assert self.config.cool_to is not None
            return not entropy >= self.config.cool_to
        return not entropy <= self.config.reheat_to

    def carry_out(self, verdict: Verdict) -> None:
        """Moves the state where `verdict` leads."""
        match verdict:
            case Verdict.ENTER_REHEAT:
                self._begin("reheat")
                self.state.round += 1
            case Verdict.TARGET_REACHED | Verdict.STEP_CAP | Verdict.NOT_COLLAPSED | Verdict.RUNAWAY:
                self._begin("rlvr")
                self.state.cooling = True
                self.state.round -= verdict is Verdict.NOT_COLLAPSED
            case Verdict.FLATTEN:
                self._begin("rlvr")
                self.state.cooling = True
                self.state.round += 1
            case Verdict.RAISE_TEMPERATURE:
                self.state.temperature_raised = True
            case Verdict.STOP:
                self.state.stopped = True

    def explain(self, verdict: Verdict, entropy: float, *, rolled_back: bool = True) -> str:
        """One line for the log; `rolled_back` says whether a run-away was undone."""
        c = self.config
        match verdict:
            case Verdict.ENTER_REHEAT if self._cools:
                return (
                    f"entropy {self.smoothed_entropy:.3f} > {c.cool_above:g} nats: "
                    f"too high, entering cooling round {self.state.round + 1}"
                )
            case Verdict.TARGET_REACHED if self._cools:
                return f"entropy {entropy:.3f} < {c.cool_to:g} nats: cooled, back to RL"
            case Verdict.STEP_CAP if self._cools:
                return f"{c.max_reheat_steps} cooling steps done at entropy {entropy:.3f} nats: back to RL"
            case Verdict.NOT_COLLAPSED if self._cools:
                return f"entropy {entropy:.3f} < {c.cool_to:g} nats before any cooling: refused, back to RL"
            case Verdict.ENTER_REHEAT:
                return (
                    f"entropy {self.smoothed_entropy:.3f} < {c.collapse_below:g} nats: "
                    f"collapsed, entering reheat round {self.state.round + 1}"
                )
            case Verdict.RAISE_TEMPERATURE:
                return (
                    f"entropy {self.smoothed_entropy:.3f} < {c.collapse_below:g} nats: "
                    f"collapsed, sampling at temperature {c.rollout_temperature:g} from here on"
                )
            case Verdict.FLATTEN:
                return f"entropy {self.smoothed_entropy:.3f} < {c.collapse_below:g} nats: collapsed, flattened"
            case Verdict.STOP:
                return f"entropy {self.smoothed_entropy:.3f} < {c.collapse_below:g} nats: collapsed, stopping as asked"
            case Verdict.TARGET_REACHED:
                return f"entropy {entropy:.3f} > {c.reheat_to:g} nats: reheated, back to RL"
            case Verdict.STEP_CAP:
                return f"{c.max_reheat_steps} reheating steps done at entropy {entropy:.3f} nats: back to RL"
            case Verdict.NOT_COLLAPSED:
                return f"entropy {entropy:.3f} > {c.reheat_to:g} nats before any reheating: refused, back to RL"
            case Verdict.RUNAWAY:
                done = "rolled back to the last good step" if rolled_back else "no earlier weights to roll back to"
                return f"entropy ran away to {entropy:.3f} nats: {done}, back to RL"
            case Verdict.CONTINUE:
                return f"entropy {entropy:.3f} nats"

    def _remember(self, entropy: float) -> None:
        self.state.stage_steps += 1
        self.state.recent_entropies = [*self.state.recent_entropies, entropy][-self.config.smoothing_steps :]

    def _begin(self, stage: Literal["rlvr", "reheat"]) -> None:
        self.state.stage = stage
        self.state.stage_steps = 0
        self.state.recent_entropies = []
