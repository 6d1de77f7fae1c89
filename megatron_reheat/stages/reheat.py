"""One step of reheating: on-policy self-distillation from the policy's own flattened distribution (arXiv 2606.00755)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from megatron_reheat.clock import Clock
from megatron_reheat.config import Config
from megatron_reheat.data.prompts import PromptCursor
from megatron_reheat.losses.reheat import TEACHER as READING
from megatron_reheat.losses.reheat import reheat_loss
from megatron_reheat.model.frozen_weights import FrozenWeights
from megatron_reheat.model.master_weights import Snapshot
from megatron_reheat.rollout.weight_sync import check_mismatch
from megatron_reheat.stages.collect import rollout_metrics
from megatron_reheat.stages.controller import Controller, Verdict
from megatron_reheat.stages.outcome import StepOutcome, derive_seed
from megatron_reheat.stages.policy import Policy
from megatron_reheat.types import At, SamplingParams, Scores, TrainBatch, TrainSequence

# the paper's rollouts; the teacher flattens the distribution that was sampled, so no other temperature is on-policy
SAMPLING_TEMPERATURE = 1.0
LAST_GOOD, TEACHER = "last_good", "teacher"


class ReheatStage:
    """Same shape as an RL step. The controller's verdict falls between backward pass and update: one pass measures both
    the entropy of the rollouts and the gradient, and the gradient is dropped when the target is already reached: an update
    that would overshoot is never made, so nothing has to be undone, in master weights or moments.

    The same steps cool a policy, by a teacher that is sharpened.

    A run-away is seen one step late, on rollouts of what the update before made. `LAST_GOOD` holds the weights from before
    that update, the last ones whose entropy was measured and let pass; `TEACHER` those with which the round began, for a
    frozen teacher (`reheat.teacher`). A round begins without either, and both are saved with it.
    """

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
        self.snapshots: dict[str, Snapshot] = {}
        self._teacher: FrozenWeights | None = None

    @property
    def snapshot_names(self) -> tuple[str, ...]:
        """Of the weights that a checkpoint in the middle of a round may have for it."""
        return (LAST_GOOD,) if self._config.reheat.teacher == "current" else (LAST_GOOD, TEACHER)

    def go_on_with(self, snapshots: Mapping[str, Snapshot | None]) -> None:
        """In the middle of a round, with what was saved of it; or outside of one, with nothing."""
        self.snapshots = {name: snapshot for name, snapshot in snapshots.items() if snapshot is not None}
        self._teacher = None

    def step(self, at: At) -> tuple[StepOutcome, Verdict]:
        clock, config, reheat = Clock(), self._config, self._config.reheat
        params = SamplingParams(SAMPLING_TEMPERATURE, config.reheat_tokens, stop_token_ids=self._stop_token_ids)
        prompts = self._cursor.next(reheat.prompts_per_step)
        groups = self._policy.sample(prompts, reheat.group_size, params, derive_seed(config.run.seed, at.step), clock)
        self._policy.rest()
        batch = TrainBatch(tuple(TrainSequence.of(g.prompt, c) for g in groups for c in g.completions))
        verdict, engine = Verdict.CONTINUE, self._policy.engine

        def accept(metrics: dict[str, float], _: Scores | None) -> bool:
            nonlocal verdict
            check_mismatch(metrics["rollout/mismatch_kl"], config.rollout.mismatch_limit, self._policy.version)
            verdict = self._controller.judge_reheat(metrics["entropy/mean"])
            if verdict is Verdict.CONTINUE:
                self.snapshots[LAST_GOOD] = engine.snapshot(into=self.snapshots.get(LAST_GOOD))
            return verdict is Verdict.CONTINUE

        with clock.phase("update"):
            readers = {} if reheat.teacher == "current" else {READING: self._frozen_teacher()}
            update = engine.update(
                batch,
                partial(reheat_loss, teacher_temperature=reheat.teacher_temperature, direction=reheat.direction),
                lr=reheat.lr,
                weight_decay=reheat.weight_decay,
                accept=accept,
                views=dict.fromkeys(readers, batch),
                readers=readers,
            )
        entropy = update.metrics["entropy/mean"]
        if not update.finite and not math.isfinite(entropy):
            verdict = self._controller.judge_reheat(entropy)  # weights that far away give no gradient to accept, either
        rolled_back = verdict is Verdict.RUNAWAY and LAST_GOOD in self.snapshots
        if rolled_back:
            engine.restore(self.snapshots[LAST_GOOD])
        if verdict is not Verdict.CONTINUE:
            self.go_on_with({})
        if update.applied or rolled_back:
            with clock.phase("sync"):
                self._policy.publish(self._policy.version + 1)
        metrics = {**rollout_metrics(groups), **update.metrics, **clock.metrics()}
        metrics["throughput/tokens_per_s"] = batch.num_tokens / metrics["time/step_s"]
        if verdict is Verdict.RUNAWAY:
            metrics["reheat/rolled_back"] = float(rolled_back)
        # what was not finite is gone with the weights that made it
        return StepOutcome(metrics, groups, entropy, update.applied, update.finite or rolled_back, rolled_back), verdict

    def _frozen_teacher(self) -> FrozenWeights:
        """The policy with which the round began, or as it was when this run went on with a round of another teacher's. A
        collective in a round's first step, and in the first after a restart."""
        if TEACHER not in self.snapshots:
            self.snapshots[TEACHER] = self._policy.engine.snapshot()
        if self._teacher is None:
            self._teacher = self._policy.engine.frozen_weights(self.snapshots[TEACHER])
        return self._teacher
