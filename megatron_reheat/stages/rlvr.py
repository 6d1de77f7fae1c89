"""One step of reinforcement learning from verifiable rewards; `methods` says what is sampled and what the loss is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from megatron_reheat.clock import Clock
from megatron_reheat.config import Config
from megatron_reheat.losses.policy_gradient import REF_LOGPROBS
from megatron_reheat.methods.grpo import GRPO
from megatron_reheat.metrics import MetricSums
from megatron_reheat.model.engine import NO_COLUMNS, Engine, UpdateResult
from megatron_reheat.parallel.packing import PerToken
from megatron_reheat.rollout.weight_sync import check_mismatch, mismatch
from megatron_reheat.stages.collect import Collector
from megatron_reheat.stages.controller import Controller, Verdict
from megatron_reheat.stages.entropy import JudgedEntropy, choose_probes, judge_entropy
from megatron_reheat.stages.outcome import StepOutcome
from megatron_reheat.stages.policy import Policy
from megatron_reheat.stages.reference import Reference
from megatron_reheat.types import POLICY, At, Collected, Group, Scores, TrainBatch


@dataclass(frozen=True)
class _Scoring:
    """The run's `methods.grpo.Scoring`, at one step."""

    engine: Engine
    frozen: Reference | None
    at: At

    def score(self, batch: TrainBatch, columns: Mapping[str, PerToken] = NO_COLUMNS) -> Scores:
        return self.engine.score(batch, temperature=self.at.temperature, columns=columns)

    def reference(self, batch: TrainBatch) -> Scores:
        assert self.frozen is not None, "the method's needs_reference() says that it needs none"
        return self.frozen.score(batch, temperature=self.at.temperature)


class _Measured(NamedTuple):
    """What the scores of a batch say: the entropy that the controller judges, the scores of what the policy sampled itself, and
    how far engine and trainer disagree on that."""

    entropy: JudgedEntropy
    own: Scores
    finite: bool
    disagreement: dict[str, float]


class RLVRStage:
    """`step` reads as the algorithm: collect, score, weigh, update, publish."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        collector: Collector,
        method: GRPO,
        controller: Controller,
        reference: Reference | None = None,
    ) -> None:
        self._config = config
        self._policy = policy
        self._collector = collector
        self._method = method
        self._controller = controller
        self._reference = reference

    def step(self, at: At) -> tuple[StepOutcome, Verdict]:
        """The controller judges the entropy of what was sampled, as the weights were before the update."""
        outcome = self._step(at)
        if outcome.entropy is None:
            return outcome, Verdict.CONTINUE
        return outcome, self._controller.observe_rl(outcome.entropy)

    def _step(self, at: At) -> StepOutcome:
        clock, config, method = Clock(), self._config, self._method
        collected = method.collect(self._collector, at, clock)
        batch = method.batch(collected, at)
        probes = choose_probes(collected, batch)
        if len(batch) + len(probes):
            self._collector.rest()
        if config.rollout.overlap and len(batch) and at.step < config.total_steps:
            after = replace(at, step=at.step + 1, rl_step=at.rl_step + 1)
            self._collector.look_ahead(after, method.group_size(after))
        scoring = _Scoring(self._policy.engine, self._reference, at)
        measure = partial(self._measure, collected, batch, probes)
        updates: list[UpdateResult] = []
        with clock.phase("score"):
            probed = scoring.score(probes)
            scores = None if self._scores_in_update(batch) else scoring.score(batch, method.columns)
        if scores is None:
            with clock.phase("score"):
                batch = self._with_reference(batch, scoring)
            with clock.phase("update"):
                updates = self._update(batch, at, passes=lambda scores: measure(probed, scores).finite)
            assert updates[0].scores is not None
            measured = measure(probed, updates[0].scores)
        elif (measured := measure(probed, scores)).finite and len(batch):
            with clock.phase("score"):
                batch = self._with_reference(method.weigh(batch, scores, scoring), scoring)
            with clock.phase("update"):
                updates = self._update(batch, at)
        if not measured.finite:
            return StepOutcome(collected.metrics | clock.metrics(), collected.shown, None, applied=False, finite=False)
        entropy = measured.entropy
        metrics = collected.metrics | {
            "entropy/mean": entropy.mean,
            "entropy/estimated": float(entropy.estimated),
            "rollout/temperature": at.temperature,
        }
        if not len(batch):
            return StepOutcome(
                metrics | clock.metrics(), collected.shown, entropy.mean, applied=False, sampled=collected.first
            )
        applied = any(u.applied for u in updates)
        if applied:
            with clock.phase("sync"):
                self._policy.publish(self._policy.version + 1)
        metrics |= {
            **MetricSums.merged(u.sums for u in updates if u.finite).reduced(),
            **{f"rollout/{name}": value for name, value in measured.disagreement.items()},
            **({"entropy/trained": measured.own.mean_entropy} if measured.own.entropies else {}),
            "rollout/staleness": self._staleness(collected.groups, applied),
            "optimizer/skipped_updates": float(sum(not u.applied for u in updates)),
            **method.metrics(),
            **clock.metrics(),
        }
        metrics["throughput/tokens_per_s"] = batch.num_tokens / metrics["time/step_s"]
        finite = all(u.finite for u in updates)
        return StepOutcome(metrics, collected.shown, entropy.mean, applied, finite, sampled=collected.first)

    def _scores_in_update(self, batch: TrainBatch) -> bool:
        """Whether the batch needs no pass of its own: its only update reads it at the same weights."""
        return (
            self._method.scores_in_loss
            and len(batch.minibatches(self._minibatch_size)) == 1
            and all(s.on_policy for s in batch.sequences)
        )

    def _with_reference(self, batch: TrainBatch, scoring: _Scoring) -> TrainBatch:
        if not self._config.rl.kl_coef:
            return batch
        return batch.with_extra(REF_LOGPROBS, scoring.reference(batch).logprobs)

    def _measure(
        self, collected: Collected, batch: TrainBatch, probes: TrainBatch, probed: Scores, scores: Scores
    ) -> _Measured:
        """Of the batch, and of the `probes` that were scored besides.

        Raises:
            ReheatError: engine and trainer disagree by more than `rollout.mismatch_limit`.
        """
        judged_tokens = self._config.judged_tokens
        entropy = judge_entropy(collected, batch, scores, probes, probed, judged_tokens=judged_tokens)
        own, disagreement = scores.of(batch), {}
        finite = bool(np.isfinite(entropy.mean + scores.mean_entropy))
        if finite and len(batch):
            # of a batch that others sampled whole, the policy's own responses are the probes
            disagreement = self._check_mismatch(*((batch, own) if own.logprobs else (probes, probed)))
        return _Measured(entropy, own, finite, disagreement)

    def _check_mismatch(self, batch: TrainBatch, measured: Scores) -> dict[str, float]:
        """How far engine and trainer disagree on what the policy sampled."""
        nothing = [np.zeros(0, np.float32)]
        disagreement = mismatch(
            np.concatenate([s.rollout_logprobs for s in batch.sequences if s.on_policy] or nothing),
            np.concatenate(measured.logprobs or nothing),
        )
        check_mismatch(disagreement["mismatch_kl"], self._config.rollout.mismatch_limit, self._policy.version)
        return disagreement

    def _staleness(self, groups: Sequence[Group], published: bool) -> float:
        """Versions between the policy that sampled and the one that was trained, in the mean."""
        trained = self._policy.version - published
        own = [trained - c.policy_version for g in groups for c in g.completions if c.sampler == POLICY]
        return float(np.mean(own or [0]))

    @property
    def _minibatch_size(self) -> int:
        """Sequences of one update."""
        rl = self._config.rl
        return (rl.minibatch_prompts or rl.prompts_per_step) * rl.group_size

    def _update(self, batch: TrainBatch, at: At, passes: Callable[[Scores], bool] | None = None) -> list[UpdateResult]:
        """`passes` judges the scores of the only update, where that makes them, before the weights change."""
        optimizer, loss = self._config.optimizer, self._method.loss(at)

        def accept(_: object, scores: Scores | None) -> bool:
            return passes is None or scores is None or passes(scores)

        return [
            self._policy.engine.update(
                minibatch,
                loss,
                lr=optimizer.lr * min(1.0, (at.stage_step + 1) / max(optimizer.warmup_steps, 1)),
                weight_decay=optimizer.weight_decay,
                aggregation=self._config.rl.aggregation,
                whole_sequences=self._method.whole_sequences,
                score=passes is not None,
                accept=accept,
                views=self._method.views(minibatch),
                taps=self._method.taps,
                attention=self._method.attention(),
            )
            for minibatch in batch.minibatches(self._minibatch_size)
        ]
