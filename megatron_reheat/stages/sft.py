"""Warm start: cross-entropy on worked answers, so that a policy worth sampling from can be made offline."""

from __future__ import annotations

import math

import numpy as np

from megatron_reheat.config import SFTConfig
from megatron_reheat.data.prompts import PromptCursor
from megatron_reheat.losses.reheat import sft_loss
from megatron_reheat.model.engine import Engine
from megatron_reheat.stages.clock import Clock
from megatron_reheat.stages.outcome import StepOutcome
from megatron_reheat.types import Prompt, TrainBatch, TrainSequence


class SFTStage:
    def __init__(self, config: SFTConfig, engine: Engine, cursor: PromptCursor, encode, weight_decay: float) -> None:
        """`encode` turns a worked answer into response token ids, end-of-sequence included."""
        self._config = config
        self._engine = engine
        self._cursor = cursor
        self._encode = encode
        self._weight_decay = weight_decay

    def step(self, step: int) -> StepOutcome:
        """`step` counts from 1."""
        clock, config = Clock(), self._config
        batch = TrainBatch(tuple(self._sequence(p) for p in self._cursor.next(config.batch_size)))
        with clock.phase("update"):
            update = self._engine.update(
                batch, sft_loss, lr=cosine_lr(step - 1, config), weight_decay=self._weight_decay
            )
        metrics = {**update.metrics, **clock.metrics()}
        metrics["throughput/tokens_per_s"] = batch.num_tokens / metrics["time/step_s"]
        return StepOutcome(metrics, (), None, update.applied, update.finite)

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
