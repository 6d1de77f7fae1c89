"""One step of reinforcement learning from verifiable rewards: GRPO/DAPO (arXiv 2402.03300, 2503.14476)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from megatron_reheat.config import Config
from megatron_reheat.data.prompts import PromptCursor
from megatron_reheat.losses.advantage import group_advantages, overlong_penalty
from megatron_reheat.losses.policy import policy_loss
from megatron_reheat.model.engine import UpdateResult
from megatron_reheat.rollout.weight_sync import check_mismatch, mismatch
from megatron_reheat.stages.clock import Clock
from megatron_reheat.stages.outcome import StepOutcome, derive_seed, sequence_of
from megatron_reheat.stages.policy import Order, Policy
from megatron_reheat.types import Group, Prompt, SamplingParams, TrainBatch


@dataclass(frozen=True)
class Collected:
    """The groups to train on and what was seen while collecting them, filtered groups included."""

    groups: list[Group]
    metrics: dict[str, float]


@dataclass(frozen=True)
class _Ahead:
    """The next step's first prompts, being sampled, and the place in the data before they were drawn."""

    order: Order
    temperature: float
    cursor_state: dict[str, Any]


class RLVRStage:
    """`step` reads as the algorithm: collect, score, update, publish."""

    def __init__(self, config: Config, policy: Policy, cursor: PromptCursor, stop_token_ids: tuple[int, ...]) -> None:
        self._config = config
        self._policy = policy
        self._cursor = cursor
        self._stop_token_ids = stop_token_ids
        self._ahead: _Ahead | None = None

    def step(self, step: int, *, stage_step: int, sampling_temperature: float, look_ahead: bool = False) -> StepOutcome:
        """`stage_step` counts from 0 since the stage began; the learning rate warms up with it.

        With `look_ahead` the first prompts of the next step are sampled while this one trains.
        """
        clock, config = Clock(), self._config
        collected = self._collect(step, sampling_temperature, clock)
        if not collected.groups:
            return StepOutcome({**collected.metrics, **clock.metrics()}, collected.groups, entropy=None, applied=False)
        self._policy.rest()
        if look_ahead:
            self._look_ahead(step + 1, sampling_temperature)
        batch = make_train_batch(collected.groups, config)
        with clock.phase("score"):
            scores = self._policy.engine.score(batch, temperature=sampling_temperature)
        if not np.isfinite(scores.mean_entropy):
            metrics = {**collected.metrics, **clock.metrics()}
            return StepOutcome(metrics, collected.groups, entropy=None, applied=False, finite=False)
        batch = batch.with_old_logprobs(scores.logprobs)
        disagreement = mismatch(
            np.concatenate([s.rollout_logprobs for s in batch.sequences]), np.concatenate(scores.logprobs)
        )
        check_mismatch(disagreement["mismatch_kl"], config.rollout.mismatch_limit, self._policy.version)
        with clock.phase("update"):
            updates = self._update(batch, stage_step, sampling_temperature)
        applied = any(u.applied for u in updates)
        if applied:
            with clock.phase("sync"):
                self._policy.publish(self._policy.version + 1)
        metrics = {
            **collected.metrics,
            **{name: float(np.mean([u.metrics[name] for u in updates])) for name in updates[-1].metrics},
            **{f"rollout/{name}": value for name, value in disagreement.items()},
            "entropy/mean": scores.mean_entropy,
            "rollout/temperature": sampling_temperature,
            "rollout/staleness": self._staleness(collected.groups, applied),
            "optimizer/skipped_updates": float(sum(not u.applied for u in updates)),
            **clock.metrics(),
        }
        metrics["throughput/tokens_per_s"] = batch.num_tokens / metrics["time/step_s"]
        return StepOutcome(metrics, collected.groups, scores.mean_entropy, applied, all(u.finite for u in updates))

    def cursor_state(self) -> dict[str, Any]:
        """The place in the data to save: prompts that were sampled ahead are not trained on yet."""
        return self._cursor.state() if self._ahead is None else self._ahead.cursor_state

    def forget_ahead(self) -> None:
        """Gives back what was sampled ahead, because another stage comes next."""
        if self._ahead is not None:
            self._policy.finish(self._ahead.order, Clock())
            self._cursor.load_state(self._ahead.cursor_state)
            self._ahead = None

    def _look_ahead(self, step: int, temperature: float) -> None:
        cursor_state = self._cursor.state()
        order = self._policy.begin(*self._request(step, 0, temperature))
        self._ahead = _Ahead(order, temperature, cursor_state)

    def _sample(self, step: int, batch: int, temperature: float, clock: Clock) -> list[Group]:
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return self._policy.sample(*self._request(step, batch, temperature), clock)
        groups = self._policy.finish(ahead.order, clock)
        if ahead.temperature == temperature:
            return groups
        self._cursor.load_state(ahead.cursor_state)
        return self._policy.sample(*self._request(step, batch, temperature), clock)

    def _request(self, step: int, batch: int, temperature: float) -> tuple[list[Prompt], int, SamplingParams, int]:
        rl = self._config.rl
        params = SamplingParams(temperature, self._config.rollout.max_tokens, stop_token_ids=self._stop_token_ids)
        seed = derive_seed(self._config.run.seed, step, batch)
        return self._cursor.next(rl.prompts_per_step), rl.group_size, params, seed

    def _staleness(self, groups: Sequence[Group], published: bool) -> float:
        """Versions between the policy that sampled and the one that was trained, in the mean."""
        trained = self._policy.version - published
        return float(np.mean([trained - c.policy_version for g in groups for c in g.completions]))

    def _update(self, batch: TrainBatch, stage_step: int, sampling_temperature: float) -> list[UpdateResult]:
        rl, optimizer = self._config.rl, self._config.optimizer
        loss = partial(
            policy_loss,
            sampling_temperature=sampling_temperature,
            clip_low=rl.clip_low,
            clip_high=rl.clip_high,
            dual_clip=rl.dual_clip,
            tis_cap=rl.tis_cap,
            entropy_coef=rl.entropy_coef,
        )
        return [
            self._policy.engine.update(
                minibatch,
                loss,
                lr=optimizer.lr * min(1.0, (stage_step + 1) / max(optimizer.warmup_steps, 1)),
                weight_decay=optimizer.weight_decay,
                aggregation=rl.aggregation,
            )
            for minibatch in batch.minibatches((rl.minibatch_prompts or rl.prompts_per_step) * rl.group_size)
        ]

    def _collect(self, step: int, sampling_temperature: float, clock: Clock) -> Collected:
        """Samples and grades until `rl.prompts_per_step` groups can teach something (DAPO's dynamic sampling).

        Groups are kept when their accuracy, not their shaped reward, varies. At the cap on generation batches the step goes
        on with what was kept; surplus groups are dropped.
        """
        rl = self._config.rl
        seen: list[Group] = []
        kept: list[Group] = []
        batches = 0
        while len(kept) < rl.prompts_per_step and (
            batches < rl.max_generation_batches or not rl.max_generation_batches
        ):
            groups = self._sample(step, batches, sampling_temperature, clock)
            seen += groups
            kept += [g for g in groups if 0 < g.accuracy < 1] if rl.dynamic_sampling else groups
            batches += 1
        metrics = {**rollout_metrics(seen), "sampling/generation_batches": float(batches)}
        metrics["sampling/kept_fraction"] = len(kept) / len(seen)
        return Collected(kept[: rl.prompts_per_step], metrics)


def make_train_batch(groups: Sequence[Group], config: Config) -> TrainBatch:
    """Sequences with group-relative advantages, from rewards with the overlong penalty added."""
    rl, sequences = config.rl, []
    for group in groups:
        rewards = [
            reward.value
            + overlong_penalty(
                len(completion.token_ids),
                max_tokens=config.rollout.max_tokens,
                buffer=rl.overlong_buffer,
                factor=rl.overlong_penalty,
            )
            for completion, reward in zip(group.completions, group.rewards, strict=True)
        ]
        advantages = group_advantages(rewards, normalize_by_std=rl.normalize_by_std)
        sequences += [
            replace(sequence_of(group.prompt, completion), advantage=advantage)
            for completion, advantage in zip(group.completions, advantages, strict=True)
        ]
    return TrainBatch(tuple(sequences))


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """What the rollouts look like, before any filter."""
    completions = [c for g in groups for c in g.completions]
    rewards = [r for g in groups for r in g.rewards]
    lengths = [len(c.token_ids) for c in completions]
    distinct = sum(len({c.token_ids.tobytes() for c in g.completions}) for g in groups)
    return {
        "reward/mean": float(np.mean([r.value for r in rewards])),
        "reward/accuracy": float(np.mean([r.correct for r in rewards])),
        "reward/timeouts": float(sum(r.timed_out for r in rewards)),
        "reward/uniform_group_fraction": float(np.mean([len({r.correct for r in g.rewards}) == 1 for g in groups])),
        "rollout/distinct_fraction": distinct / len(completions),
        "response/length_mean": float(np.mean(lengths)),
        "response/length_max": float(max(lengths)),
        "response/truncated_fraction": float(np.mean([c.finish_reason == "length" for c in completions])),
    }
