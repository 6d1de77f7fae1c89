"""Warm start: cross-entropy on worked answers, so that a policy worth sampling from can be made offline."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from megatron_reheat.clock import Clock
from megatron_reheat.config import Config, SFTConfig
from megatron_reheat.data.prompts import PromptCursor
from megatron_reheat.losses.reheat import sft_loss
from megatron_reheat.stages.controller import Verdict
from megatron_reheat.stages.outcome import StepOutcome
from megatron_reheat.stages.policy import Policy
from megatron_reheat.types import At, Prompt, TrainBatch, TrainSequence


class SFTStage:
    """An update on the worked answers of `sft.batch_size` prompts each step; nothing is sampled."""

    def __init__(
        self, config: Config, policy: Policy, cursor: PromptCursor, encode: Callable[[str], list[int]]
    ) -> None:
        """`encode` turns a worked answer into response token ids, end-of-sequence included."""
        self._config = config
        self._policy = policy
        self._cursor = cursor
        self._encode = encode

    def step(self, at: At) -> tuple[StepOutcome, Verdict]:
        clock, config = Clock(), self._config.sft
        self._policy.rest()
        batch = TrainBatch(tuple(self._sequence(p) for p in self._cursor.next(config.batch_size)))
        with clock.phase("update"):
            update = self._policy.engine.update(
                batch,
                sft_loss,
                lr=cosine_lr(at.step - 1, config),
                weight_decay=self._config.optimizer.weight_decay,
            )
        metrics = {**update.metrics, **clock.metrics()}
        metrics["throughput/tokens_per_s"] = batch.num_tokens / metrics["time/step_s"]
        return StepOutcome(metrics, (), None, update.applied, update.finite), Verdict.CONTINUE

    def _sequence(self, prompt: Prompt) -> TrainSequence:
        assert prompt.solution is not None  # the configuration asks for data.solution_template
        token_ids = np.asarray([*prompt.token_ids, *self._encode(prompt.solution)], dtype=np.int32)
        return TrainSequence(token_ids, num_prompt_tokens=len(prompt.token_ids))


def cosine_lr(step: int, config: SFTConfig) -> float:
    """Linear warm-up, then a cosine to zero; `step` counts from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
