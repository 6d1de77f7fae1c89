"""Prompts in, graded groups out: what an RL step trains on, and the one owner of what is sampled ahead."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from megatron_reheat.clock import Clock
from megatron_reheat.config import Config
from megatron_reheat.data.prompts import PromptCursor
from megatron_reheat.methods.grpo import Complete
from megatron_reheat.stages.outcome import derive_seed
from megatron_reheat.stages.policy import FrozenSampler, Order, Policy
from megatron_reheat.stages.surplus import SampledAs, Surplus
from megatron_reheat.types import POLICY, At, Collected, Completion, Group, Prompt, SamplingParams

T = TypeVar("T")
U = TypeVar("U")

# Unlimited generation batches are for prompts of which few teach something, not for a policy that has nothing left to learn
# from: after so many batches in a row without a single kept group, the controller has to see the step.
FRUITLESS_BATCHES = 10

MAX_OVERSAMPLING = 4  # times `rl.prompts_per_step`, of one generation batch
RECENT = 0.3  # weight of a step's fraction of kept groups in their running mean

AGAIN = 1  # tells the seeds of `again` from those of the generation batches


class StepAbandoned(Exception):
    """The run was asked to stop between two generation batches; the place in the data is that from before the step."""


@dataclass(frozen=True)
class _Ahead:
    """The next step's first prompts, being sampled, and the place in the data before they were drawn."""

    order: Order
    group_size: int
    temperature: float
    cursor_state: dict[str, Any]


@dataclass(frozen=True)
class _GenerationBatch:
    """What the policy sampled, what became of it, group by group, and which of that can teach something."""

    sampled: list[Group]
    completed: list[Group]
    teaches: list[bool]

    @property
    def kept(self) -> list[Group]:
        return [g for g, teaches in zip(self.completed, self.teaches, strict=True) if teaches]


class Collector:
    """Samples and grades an RL step's groups, and the next step's first prompts while this one trains.

    It is the `methods.grpo.Sampling` of the run's method. `frozen` are the models besides the policy that it samples from.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        cursor: PromptCursor,
        stop_token_ids: tuple[int, ...],
        should_stop: Callable[[], bool],
        frozen: Mapping[str, FrozenSampler] | None = None,
    ) -> None:
        """`should_stop` is asked on every rank between two generation batches, and gives all the same answer."""
        self._config = config
        self._policy = policy
        self._frozen = frozen or {}
        self._cursor = cursor
        self._stop_token_ids = stop_token_ids
        self._should_stop = should_stop
        self._ahead: _Ahead | None = None
        # of groups, in a running mean over the steps so far; None before the first
        self.kept_fraction: float | None = None
        self.surplus = Surplus(config.rl.max_staleness)
        self._again_seeds: Iterator[int] = iter(())

    def collect(self, at: At, clock: Clock, *, group_size: int, complete: Complete | None = None) -> Collected:
        """Samples and grades until `rl.prompts_per_step` groups can teach something (DAPO's dynamic sampling).

        Groups are kept when the grader's reward, which no method has shaped yet, varies. A generation batch is as large as the
        steps so far say that it has to be (`rl.oversample`): every further one waits for its own longest response. At the cap
        on generation batches the step goes on with what was kept, which may be nothing. Surplus groups, the last drawn first,
        are dropped or, with `rl.max_staleness`, come first in the next step; each step samples something all the same.

        Raises:
            StepAbandoned: the run was asked to stop in the meantime.
        """
        rl, before = self._config.rl, self.cursor_state()
        self._again_seeds = (derive_seed(self._config.run.seed, at.step, AGAIN, k) for k in itertools.count())
        sampled_as = SampledAs(group_size, at.temperature)
        keeps = bool(rl.max_staleness) and complete is None  # what a method made of a group is that step's
        fresh = self.surplus.fresh(sampled_as, self._policy.version) if keeps else []
        reused = fresh[: rl.prompts_per_step - 1]
        wanted = rl.prompts_per_step - len(reused)
        batches: list[_GenerationBatch] = []
        while sum(len(b.kept) for b in batches) < wanted and not self._gives_up(batches):
            if batches and self._should_stop():
                self._cursor.load_state(before)
                raise StepAbandoned
            missing = wanted - sum(len(b.kept) for b in batches)
            sampled = self._sample(at, len(batches), group_size, clock, self._batch_size(missing))
            completed = complete(sampled) if complete else sampled
            batches.append(_GenerationBatch(sampled, completed, [self._teaches(g) for g in completed]))
        seen = [g for b in batches for g in b.sampled]
        kept = [g for b in batches for g in b.kept]
        metrics = {**rollout_metrics(seen), "sampling/generation_batches": float(len(batches))}
        metrics["sampling/prompts"] = float(len(seen))
        metrics["sampling/kept_fraction"] = fraction = len(kept) / len(seen)
        metrics["sampling/surplus_groups"] = float(max(len(kept) - wanted, 0))
        if keeps:
            metrics["sampling/reused_groups"] = float(len(reused))
            metrics["sampling/expired_groups"] = float(len(self.surplus) - len(fresh))
            self.surplus.replace(sampled_as, [*fresh[len(reused) :], *kept[wanted:]])
        before_it = fraction if self.kept_fraction is None else self.kept_fraction
        self.kept_fraction = (1 - RECENT) * before_it + RECENT * fraction
        first = batches[0]
        discarded = [g for g, teaches in zip(first.sampled, first.teaches, strict=True) if not teaches]
        return Collected([*reused, *kept[:wanted]], first.sampled, discarded, metrics)

    def again(
        self,
        prompts: Sequence[Prompt],
        n: int,
        temperature: float,
        clock: Clock,
        *,
        sampler: str = POLICY,
        top_p: float = 1.0,
    ) -> list[Group]:
        """`n` more graded completions of prompts that were drawn already, from any sampler at any temperature.

        Each call of a step has a seed of its own. Where engines share devices, the policy's rests meanwhile, and a frozen
        model's is awake only here.
        """
        params = SamplingParams(temperature, self._config.rollout.max_tokens, top_p, self._stop_token_ids)
        frozen = None if sampler == POLICY else self._frozen[sampler]
        if frozen is not None:
            self._policy.rest()
        groups = (frozen or self._policy).sample(list(prompts), n, params, next(self._again_seeds), clock)
        if frozen is not None:
            frozen.rest()
        return [replace(g, completions=tuple(replace(c, sampler=sampler) for c in g.completions)) for g in groups]

    def grade(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], clock: Clock
    ) -> list[Group]:
        """Groups of completions that no sampler of the run made."""
        return self._policy.grade(prompts, completions, clock)

    def divide(self, items: Sequence[T], work: Callable[[Sequence[T]], Iterable[U]]) -> list[U]:
        """What `work` makes of each item, for what is too slow to be done on every rank alike."""
        return self._policy.divide(items, work)

    def rest(self) -> None:
        """Nothing is sampled until weights are published again: the policy's engines give their memory to the trainer, if
        shared, as frozen ones do whenever they have sampled."""
        self._policy.rest()

    def _teaches(self, group: Group) -> bool:
        return not group.is_uniform or not self._config.rl.dynamic_sampling

    def _gives_up(self, batches: Sequence[_GenerationBatch]) -> bool:
        limit = self._config.rl.max_generation_batches
        if limit:
            return len(batches) >= limit
        return len(batches) >= FRUITLESS_BATCHES and not any(b.kept for b in batches[-FRUITLESS_BATCHES:])

    def look_ahead(self, at: At, group_size: int) -> None:
        """Begins to sample the first prompts of the step `at` from the weights of now."""
        cursor_state = self._cursor.state()
        rl = self._config.rl
        # this step's update makes what is kept older by one
        kept = self.surplus.fresh(SampledAs(group_size, at.temperature), self._policy.version + 1)
        size = self._batch_size(max(rl.prompts_per_step - len(kept), 1))
        order = self._policy.begin(*self._request(at, 0, group_size, size))
        self._ahead = _Ahead(order, group_size, at.temperature, cursor_state)

    def forget(self) -> None:
        """Gives back what was sampled ahead and drops what was kept, because another stage or other weights come next."""
        self.surplus.forget()
        if self._ahead is not None:
            self._policy.finish(self._ahead.order, Clock())
            self._cursor.load_state(self._ahead.cursor_state)
            self._ahead = None

    def cursor_state(self) -> dict[str, Any]:
        """The place in the data to save: prompts that were sampled ahead are not trained on yet."""
        return self._cursor.state() if self._ahead is None else self._ahead.cursor_state

    def _batch_size(self, missing: int) -> int:
        """Prompts of a generation batch that brings `missing` groups to train on, if as many are kept as lately, five times in
        six."""
        rl = self._config.rl
        if not (rl.dynamic_sampling and rl.oversample) or self.kept_fraction is None:
            return rl.prompts_per_step
        most = MAX_OVERSAMPLING * rl.prompts_per_step
        spread = math.sqrt(missing * (1 - self.kept_fraction))  # a standard deviation of how many are kept
        return min(math.ceil((missing + spread) / max(self.kept_fraction, 1 / most)), most)

    def _sample(self, at: At, batch: int, group_size: int, clock: Clock, size: int) -> list[Group]:
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return self._policy.sample(*self._request(at, batch, group_size, size), clock)
        groups = self._policy.finish(ahead.order, clock)
        if (ahead.temperature, ahead.group_size) == (at.temperature, group_size):
            return groups
        self._cursor.load_state(ahead.cursor_state)
        return self._policy.sample(*self._request(at, batch, group_size, size), clock)

    def _request(self, at: At, batch: int, group_size: int, size: int) -> tuple[list[Prompt], int, SamplingParams, int]:
        params = SamplingParams(at.temperature, self._config.rollout.max_tokens, stop_token_ids=self._stop_token_ids)
        seed = derive_seed(self._config.run.seed, at.step, batch)
        return self._cursor.next(size), group_size, params, seed


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """What the rollouts look like, before any filter."""
    completions = [c for g in groups for c in g.completions]
    rewards = [r for g in groups for r in g.rewards]
    lengths = [len(c.token_ids) for c in completions]
    parts = sorted({name for r in rewards for name in r.parts})
    distinct = sum(len({c.token_ids.tobytes() for c in g.completions}) for g in groups)
    return {
        "reward/mean": float(np.mean([r.value for r in rewards])),
        "reward/accuracy": float(np.mean([r.correct for r in rewards])),
        "reward/timeouts": float(sum(r.timed_out for r in rewards)),
        "reward/uniform_group_fraction": float(np.mean([g.is_uniform for g in groups])),
        **{f"reward/{name}": float(np.mean([r.parts[name] for r in rewards if name in r.parts])) for name in parts},
        "rollout/distinct_fraction": distinct / len(completions),
        "response/length_mean": float(np.mean(lengths)),
        "response/length_max": float(max(lengths)),
        "response/truncated_fraction": float(np.mean([c.finish_reason == "length" for c in completions])),
        **_metrics_by_source(groups),
    }


def _metrics_by_source(groups: Sequence[Group]) -> dict[str, float]:
    """Of each part of `data.mix` that was sampled for."""
    metrics = {}
    for name in sorted({g.prompt.source for g in groups} - {""}):
        own = [g for g in groups if g.prompt.source == name]
        metrics[f"data/{name}/share"] = len(own) / len(groups)
        metrics[f"data/{name}/accuracy"] = float(np.mean([r.correct for g in own for r in g.rewards]))
        metrics[f"data/{name}/uniform_group_fraction"] = float(np.mean([g.is_uniform for g in own]))
    return metrics
