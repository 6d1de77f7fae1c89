"""Which weights a reheating step leaves behind, and what it says about that; the trainer here is a counter of updates."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_reheat.metrics import MetricSums
from megatron_reheat.model.engine import UpdateResult
from megatron_reheat.recipe import parse_config
from megatron_reheat.stages.controller import Controller, ControllerState, Verdict
from megatron_reheat.stages.reheat import LAST_GOOD, ReheatStage
from megatron_reheat.types import At, Completion, Group, Prompt, Reward

CONFIG = parse_config(
    {
        "model": {"hf_path": "unused"},
        "data": {"path": "unused.jsonl"},
        "controller": {"collapse_below": 0.08, "reheat_to": 0.12, "runaway_entropy": 0.5, "runaway_jump": 0.3},
    }
)
GROUPS = [
    Group(
        Prompt(0, "", (1,), {}),
        (Completion(np.array([1], np.int32), np.zeros(1, np.float32), 1.0, 0, "stop"),),
        (Reward(0.0, False),),
    )
]


class Trainer:
    """`weights` is how many updates were made; each call of `update` measures the next of `entropies`, a NaN or a pair
    (entropy, False) with a gradient that is not finite."""

    def __init__(self, *entropies: float | tuple[float, bool]) -> None:
        self.weights, self.copies = 0, 0
        self._measured = iter(entropies)

    def update(self, batch: Any, loss: Any, *, accept: Any, **_: Any) -> UpdateResult:
        measured = next(self._measured)
        entropy, finite = measured if isinstance(measured, tuple) else (measured, math.isfinite(measured))
        sums = MetricSums()
        sums.add_mean("entropy/mean", entropy, 1)
        sums.add_mean("rollout/mismatch_kl", 0.0 if finite else math.nan, 1)
        applied = finite and accept(sums.reduced(), None)
        self.weights += applied
        return UpdateResult(sums, applied, finite)

    def snapshot(self, into: Any = None) -> dict[str, torch.Tensor]:
        self.copies += 1
        return {"w": torch.tensor(self.weights)}

    def restore(self, snapshot: dict[str, torch.Tensor]) -> None:
        self.weights = int(snapshot["w"])


def at(step: int) -> At:
    return At(step=step, rl_step=1, stage_step=0, temperature=1.0, seed=0)


def reheating(
    trainer: Trainer, state: ControllerState | None = None
) -> tuple[ReheatStage, Controller, SimpleNamespace]:
    controller = Controller(CONFIG.controller, state or ControllerState(stage="reheat", round=1))
    policy = SimpleNamespace(version=0, engine=trainer, sample=lambda *_: GROUPS, rest=lambda: None)
    policy.publish = lambda version: setattr(policy, "version", version)
    cursor: Any = SimpleNamespace(next=lambda n: [GROUPS[0].prompt])
    return ReheatStage(CONFIG, policy, cursor, (), controller), controller, policy  # type: ignore[arg-type]


def steps(stage: ReheatStage, controller: Controller, count: int) -> list[Verdict]:
    verdicts = []
    for step in range(count):
        outcome, verdict = stage.step(at(step))
        if verdict is not Verdict.CONTINUE:
            controller.carry_out(verdict)
        assert ("reheat/rolled_back" in outcome.metrics) == (verdict is Verdict.RUNAWAY)
        assert outcome.finite or not outcome.rolled_back
        verdicts.append(verdict)
    return verdicts


RUNS = {
    # measured entropies -> verdicts, and the weights that are left
    "by the first update": ([0.05, 0.9], [Verdict.CONTINUE, Verdict.RUNAWAY], 0),
    "by the third": ([0.05, 0.06, 0.07, 0.9], [Verdict.CONTINUE] * 3 + [Verdict.RUNAWAY], 2),
    "after a skipped update": ([0.05, (0.06, False), 0.9], [Verdict.CONTINUE] * 2 + [Verdict.RUNAWAY], 0),
    "into no number": ([0.05, 0.06, math.nan], [Verdict.CONTINUE] * 2 + [Verdict.RUNAWAY], 1),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_runaway_goes_back_to_the_last_weights_that_were_measured_and_let_pass(run):
    entropies, verdicts, weights = run
    trainer = Trainer(*entropies)
    stage, controller, policy = reheating(trainer)
    assert steps(stage, controller, len(entropies)) == verdicts
    assert trainer.weights == weights
    assert stage.snapshots == {}
    updates = sum(v is Verdict.CONTINUE for v in verdicts) - sum(isinstance(e, tuple) for e in entropies)
    assert trainer.copies == updates
    assert policy.version == updates + 1  # one for each, one for the way back


def test_an_update_that_would_overshoot_is_not_made_and_nothing_is_undone():
    trainer = Trainer(0.05, 0.13)
    stage, controller, policy = reheating(trainer)
    assert steps(stage, controller, 2) == [Verdict.CONTINUE, Verdict.TARGET_REACHED]
    assert (trainer.weights, policy.version, stage.snapshots) == (1, 1, {})


def test_two_rounds_that_run_away_each_go_back_to_their_own_weights():
    trainer = Trainer(0.05, 0.9, 0.05, 0.06, 0.9)
    stage, controller, _ = reheating(trainer)
    steps(stage, controller, 2)
    trainer.weights = 10  # what RL does in between
    controller.carry_out(Verdict.ENTER_REHEAT)
    assert steps(stage, controller, 3)[-1] is Verdict.RUNAWAY
    assert trainer.weights == 11


@pytest.mark.parametrize("kept", [True, False])
def test_after_a_restart_it_says_whether_it_went_back(kept):
    trainer = Trainer(0.9)
    trainer.weights = 5
    state = ControllerState(stage="reheat", round=1, stage_steps=3, recent_entropies=[0.05, 0.06, 0.07])
    stage, controller, policy = reheating(trainer, state)
    stage.go_on_with({LAST_GOOD: {"w": torch.tensor(4)} if kept else None})
    outcome, verdict = stage.step(at(1))
    assert verdict is Verdict.RUNAWAY
    assert outcome.rolled_back is kept and outcome.metrics["reheat/rolled_back"] == kept
    assert (trainer.weights, policy.version) == ((4, 1) if kept else (5, 0))  # what did not change gets no new version
    text = controller.explain(verdict, 0.9, rolled_back=outcome.rolled_back)
    assert ("rolled back to the last good step" in text) is kept
    assert ("no earlier weights" in text) is not kept
