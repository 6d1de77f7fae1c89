"""One step of reheating: on-policy self-distillation from the policy's own flattened distribution (arXiv 2606.00755)."""

from __future__ import annotations

from functools import partial

from megatron_reheat.config import Config
from megatron_reheat.data.prompts import PromptCursor
from megatron_reheat.losses.reheat import reheat_loss
from megatron_reheat.rollout.weight_sync import check_mismatch
from megatron_reheat.stages.clock import Clock
from megatron_reheat.stages.controller import Controller, Verdict
from megatron_reheat.stages.outcome import StepOutcome, derive_seed, sequence_of
from megatron_reheat.stages.policy import Policy
from megatron_reheat.stages.rlvr import rollout_metrics
from megatron_reheat.types import SamplingParams, TrainBatch

# the paper's rollouts; the teacher flattens the distribution that was sampled, so no other temperature is on-policy
SAMPLING_TEMPERATURE = 1.0


class ReheatStage:
    """Same shape as an RL step. The controller's verdict falls between backward pass and update: one pass measures both
    the entropy of the rollouts and the gradient, and the gradient is dropped when the target is already reached."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        cursor: PromptCursor,
        stop_token_ids: tuple[int, ...],
        controller: Controller,
    ) -> None:
        self._config = config
        self._policy = policy
        self._cursor = cursor
        self._stop_token_ids = stop_token_ids
        self._controller = controller
        self._last_good: dict | None = None

    def step(self, step: int) -> tuple[StepOutcome, Verdict]:
        clock, config, reheat = Clock(), self._config, self._config.reheat
        params = SamplingParams(SAMPLING_TEMPERATURE, reheat.max_tokens, stop_token_ids=self._stop_token_ids)
        prompts = self._cursor.next(reheat.prompts_per_step)
        groups = self._policy.sample(prompts, reheat.group_size, params, derive_seed(config.run.seed, step), clock)
        self._policy.rest()
        batch = TrainBatch(tuple(sequence_of(g.prompt, c) for g in groups for c in g.completions))
        verdict = Verdict.CONTINUE

        def accept(metrics: dict[str, float]) -> bool:
            nonlocal verdict
            check_mismatch(metrics["rollout/mismatch_kl"], config.rollout.mismatch_limit, self._policy.version)
            verdict = self._controller.judge_reheat(metrics["entropy/mean"])
            if verdict is Verdict.CONTINUE:
                self._last_good = self._policy.engine.snapshot()
            return verdict is Verdict.CONTINUE

        with clock.phase("update"):
            update = self._policy.engine.update(
                batch,
                partial(reheat_loss, teacher_temperature=reheat.teacher_temperature, direction=reheat.direction),
                lr=reheat.lr,
                weight_decay=reheat.weight_decay,
                accept=accept,
            )
        if verdict is Verdict.RUNAWAY and self._last_good is not None:
            self._policy.engine.restore(self._last_good)
        if verdict is not Verdict.CONTINUE:
            self._last_good = None
        if update.applied or verdict is Verdict.RUNAWAY:
            with clock.phase("sync"):
                self._policy.publish(self._policy.version + 1)
        metrics = {**rollout_metrics(groups), **update.metrics, **clock.metrics()}
        metrics["throughput/tokens_per_s"] = batch.num_tokens / metrics["time/step_s"]
        return StepOutcome(metrics, groups, metrics["entropy/mean"], update.applied, update.finite), verdict
