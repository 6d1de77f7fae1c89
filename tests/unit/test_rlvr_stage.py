"""Which steps score in their update, and that the scores are heard before the weights change; the trainer is a recorder."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_reheat.config import Config
from megatron_reheat.errors import WeightSyncError
from megatron_reheat.methods import choose_method
from megatron_reheat.methods.grpo import Tools
from megatron_reheat.metrics import MetricSums
from megatron_reheat.model.engine import UpdateResult
from megatron_reheat.recipe import parse_config
from megatron_reheat.stages.controller import Controller
from megatron_reheat.stages.outcome import StepOutcome
from megatron_reheat.stages.rlvr import RLVRStage
from megatron_reheat.types import At, Collected, Completion, Group, Prompt, Reward, Scores, TrainBatch

SAMPLED, ENTROPY = -0.5, 0.4  # of every token, by the engine's account and the trainer's
AT = At(step=1, rl_step=1, stage_step=0, temperature=1.0, seed=0)


class Trainer:
    """Says of every token the same, and counts passes and updates."""

    def __init__(self, logprob: float, entropy: float) -> None:
        self.logprob, self.entropy = logprob, entropy
        self.scored, self.updates, self.in_update = 0, 0, 0

    def scores(self, batch: TrainBatch) -> Scores:
        rows = [np.ones(s.num_response_tokens, np.float32) for s in batch.sequences]
        return Scores([row * self.logprob for row in rows], [row * self.entropy for row in rows])

    def score(self, batch: TrainBatch, **_: Any) -> Scores:
        self.scored += len(batch)
        return self.scores(batch)

    def update(self, batch: TrainBatch, loss: Any, *, accept: Any, score: bool, **_: Any) -> UpdateResult:
        self.in_update += score
        assert score or all(s.old_logprobs is not None for s in batch.sequences)
        scores = self.scores(batch) if score else None
        applied = accept({}, scores)
        self.updates += applied
        return UpdateResult(MetricSums(), applied, True, scores)


def configured(**rl: Any) -> Config:
    sizes = {"prompts_per_step": 2, "group_size": 2, "dynamic_sampling": False}
    return parse_config({"model": {"hf_path": "m"}, "data": {"path": "d"}, "rl": {**sizes, **rl}})


def step(trainer: Trainer, config: Config, sampled_at: float = 1.0) -> StepOutcome:
    def completion(temperature: float) -> Completion:
        return Completion(np.ones(3, np.int32), np.full(3, SAMPLED, np.float32), temperature, 0, "stop")

    verdicts = (Reward(1.0, True), Reward(0.0, False))
    groups = [
        Group(Prompt(i, "", (1,), {}), (completion(1.0), completion(sampled_at)), verdicts)
        for i in range(config.rl.prompts_per_step)
    ]
    policy = SimpleNamespace(version=0, engine=trainer, publish=lambda version: None)
    collector = SimpleNamespace(
        collect=lambda *_, **__: Collected(groups, groups, [], {}), rest=lambda: None, look_ahead=lambda *_: None
    )
    tools: Any = Tools(None, str, lambda *_: None)
    method = choose_method(config).make(config, tools)
    stage = RLVRStage(config, policy, collector, method, Controller(config.controller))  # type: ignore[arg-type]
    return stage.step(AT)[0]


def test_a_step_with_one_update_has_no_pass_of_its_own() -> None:
    trainer = Trainer(SAMPLED, ENTROPY)
    outcome = step(trainer, configured())
    assert (trainer.scored, trainer.in_update, trainer.updates) == (0, 1, 1)
    assert outcome.applied and outcome.entropy == pytest.approx(ENTROPY)
    assert outcome.metrics["rollout/mismatch_kl"] == pytest.approx(0.0, abs=1e-6)
    assert outcome.metrics["entropy/trained"] == pytest.approx(ENTROPY)


@pytest.mark.parametrize(
    ("rl", "sampled_at"),
    [
        ({"minibatch_prompts": 1}, 1.0),  # the second update is of another policy than sampled
        ({"method": "opefo"}, 1.0),  # what it does follows from the whole batch
        ({}, 0.7),  # what was sampled at another temperature is trained on as the trainer scores it
    ],
)
def test_other_steps_are_scored_before(rl: dict[str, Any], sampled_at: float) -> None:
    trainer = Trainer(SAMPLED, ENTROPY)
    outcome = step(trainer, configured(**rl), sampled_at)
    assert (trainer.scored, trainer.in_update) == (4, 0) and trainer.updates == (
        2 if rl.get("minibatch_prompts") else 1
    )
    assert outcome.applied and outcome.entropy == pytest.approx(ENTROPY)


def test_an_engine_that_samples_from_other_weights_is_noticed_before_the_weights_change() -> None:
    trainer = Trainer(SAMPLED - 2.0, ENTROPY)
    with pytest.raises(WeightSyncError, match=r"above rollout.mismatch_limit"):
        step(trainer, configured())
    assert trainer.in_update == 1 and trainer.updates == 0


@pytest.mark.parametrize("rl", [{}, {"minibatch_prompts": 1}])
def test_scores_that_are_no_numbers_change_no_weights(rl: dict[str, Any]) -> None:
    trainer = Trainer(SAMPLED, math.nan)
    outcome = step(trainer, configured(**rl))
    assert trainer.updates == 0 and not outcome.applied and not outcome.finite and outcome.entropy is None
