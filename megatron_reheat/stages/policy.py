"""What is sampled from: the policy in training, whose vLLM engines hold exactly Megatron's weights, and frozen models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from megatron_reheat.clock import Clock
from megatron_reheat.config import RolloutConfig
from megatron_reheat.errors import EngineDied, ReheatError
from megatron_reheat.model.engine import Engine
from megatron_reheat.parallel.seats import engine_seats
from megatron_reheat.parallel.topology import Topology
from megatron_reheat.rewards.pool import VerifierPool
from megatron_reheat.rollout.rollout_engine import OnFinished, RolloutEngine, SyncReport
from megatron_reheat.rollout.weight_sync import WeightSync
from megatron_reheat.stages.graders import Graders
from megatron_reheat.types import Completion, Group, Prompt, Reward, SamplingParams

if TYPE_CHECKING:
    from megatron_reheat.rollout.server.fleet import ServerFleet

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class _Answer:
    """What an engine answered, or how it died."""

    value: Any = None
    died: str | None = None


@dataclass
class Order:
    """Prompts to sample from, and how; `started` where this rank's share is being sampled in the background."""

    prompts: Sequence[Prompt]
    generate: Callable[[], list[list[Completion]]]
    graders: Graders | None
    started: Future[list[list[Completion]]] | None = None


class Sampler:
    """Engines kept at the weights that `weights()` streams as (Hugging Face name, tensor); every method is a collective over
    all ranks.

    Some ranks (`engine_seats`) hold an engine and verifiers; on the others both are None. An engine that dies is
    restarted, given the weights again and asked again, up to `rollout.max_restarts` times; `engine_restarts` counts.

    Servers (`ServerFleet`) are one engine that all replicas share: the first replica feeds and restarts it for all.
    """

    def __init__(
        self,
        rollout: RolloutConfig,
        topology: Topology,
        sampler: RolloutEngine | None,
        verifiers: VerifierPool | None,
        decode: Callable[[Sequence[int]], str],
        weights: Callable[[], Iterator[tuple[str, Tensor]]],
    ) -> None:
        self._seats = engine_seats(topology, rollout)
        assert (sampler is not None) == (verifiers is not None) == self._seats.is_leader
        self._weights = weights
        self.version = 0
        self.engine_restarts = 0
        self.decode = decode
        self._sampler = sampler
        self._verifiers = verifiers
        self._shared = rollout.mode == "server"
        self._rests = rollout.mode == "colocated"
        self._resting = False
        self._ahead: Order | None = None
        self._background = ThreadPoolExecutor(1, thread_name_prefix="sampling-ahead")
        self._weight_sync = WeightSync(sampler, rollout)

    def publish(self, version: int) -> SyncReport:
        """Gives the current weights to every engine and stamps them `version`; returns the first replica's report.

        Raises:
            ReheatError: an engine does not hold what was sent (the message names the tensors), or keeps dying.
        """
        self.version = version
        return self._publish()[0]

    def sample(self, prompts: Sequence[Prompt], n: int, params: SamplingParams, seed: int, clock: Clock) -> list[Group]:
        """`n` graded completions per prompt, on every rank; prompts are dealt out over the engines.

        Raises:
            ReheatError: an engine keeps dying, or a prompt does not fit the context; the same error on every rank.
        """
        self._make_ready()
        return self.finish(self._order(prompts, n, params, seed), clock)

    def begin(self, prompts: Sequence[Prompt], n: int, params: SamplingParams, seed: int) -> Order:
        """Starts what `sample` does and returns at once; `finish` waits. The weights are those of now.

        One at a time, and for engines with devices of their own: the trainer goes on meanwhile.
        """
        order = self._order(prompts, n, params, seed)
        if self._sampler is not None:
            order.started = self._background.submit(order.generate)
        self._ahead = order
        return order

    def finish(self, order: Order, clock: Clock) -> list[Group]:
        """Waits for what `begin` started; returns and raises what `sample` does."""
        with clock.phase("rollout"):
            shares = self._sample_with_restarts(order)
        if order is self._ahead:
            self._ahead = None
        return self._grade(order.prompts, _interleave(shares, len(order.prompts)), order.graders, clock)

    def grade(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], clock: Clock
    ) -> list[Group]:
        """Grades the completions of each prompt, whoever wrote them; each engine's rank its share."""
        return self._grade(prompts, completions, self._graders(prompts), clock)

    def divide(self, items: Sequence[T], work: Callable[[Sequence[T]], Iterable[U]]) -> list[U]:
        """What `work` makes of each item, on every rank; each engine's rank does its share.

        Raises:
            ReheatError: what `work` raised anywhere; the same error on every rank.
        """
        results, error = [], None
        if self._seats.is_leader:
            try:
                results = list(work(items[self._seats.index :: self._seats.count]))
            except ReheatError as failure:
                error = str(failure)
        return _interleave(self._seats.share(results, error), len(items))

    def _order(self, prompts: Sequence[Prompt], n: int, params: SamplingParams, seed: int) -> Order:
        mine, graders = prompts[self._seats.index :: self._seats.count], self._graders(prompts)
        hand_over: OnFinished | None = None
        if graders is not None and self._verifiers is not None and self._verifiers.while_sampling:
            hand_over = graders.take

        def generate() -> list[list[Completion]]:
            assert self._sampler is not None and graders is not None
            graders.forget()
            return self._sampler.generate([p.token_ids for p in mine], params, n, seed + self._seats.index, hand_over)

        return Order(prompts, generate, graders)

    def _graders(self, prompts: Sequence[Prompt]) -> Graders | None:
        """For this rank's share of the prompts, where it has verifiers."""
        if self._verifiers is None:
            return None
        return Graders(self._verifiers, prompts[self._seats.index :: self._seats.count], self.decode)

    def rest(self) -> None:
        """Nothing is sampled until weights are published again: colocated engines give their memory to the trainer."""
        if not self._rests or self._resting:
            return
        self._resting = True
        self._ask(None if self._sampler is None else self._sampler.sleep)

    def _grade(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        graders: Graders | None,
        clock: Clock,
    ) -> list[Group]:
        """Graded groups on every rank; `graders` are of this rank's share."""
        mine: list[list[Reward]] = []
        error = None
        with clock.phase("reward"):
            if graders is not None:
                try:
                    mine = graders.rewards(completions[self._seats.index :: self._seats.count])
                except ReheatError as failure:
                    error = str(failure)
            rewards = _interleave(self._seats.share(mine, error), len(prompts))
        return [
            Group(prompt, tuple(texts), tuple(graded))
            for prompt, texts, graded in zip(prompts, completions, rewards, strict=True)
        ]

    def _sample_with_restarts(self, order: Order) -> list[Any]:
        generate = order.generate
        answers = self._ask(None if self._sampler is None else order.started.result if order.started else generate)
        while any(a.died for a in answers):
            self._revive(answers)
            self._publish()
            again = answers[self._seats.index].died
            retried = self._ask(generate if again and self._sampler is not None else None)
            answers = [new if old.died else old for old, new in zip(answers, retried, strict=True)]
        return [a.value for a in answers]

    def _publish(self) -> list[SyncReport]:
        if self._ahead is not None:
            if self._ahead.started is not None:
                wait([self._ahead.started])  # how it went is for `finish` to see
            self._seats.share(None, None)  # no engine changes its weights before all have done

        if self._resting:
            _give_back_unused()
            self._seats.share(None, None)  # on every rank, before the first engine wakes
        # the ranks of a replica produce the tensors together, so all of them take part
        action = None if self._follows else self._push
        answers = self._ask(action)
        while any(a.died for a in answers):
            self._revive(answers)
            answers = self._ask(action)
        self._resting = False
        if self._follows and self._sampler is not None:
            cast("ServerFleet", self._sampler).adopt(self.version)
        return [a.value for a in answers]

    def _push(self) -> SyncReport:
        if self._resting and self._sampler is not None:
            self._sampler.wake()
        return self._weight_sync.push(self._waking_weights() if self._resting else self._weights(), self.version)

    def _waking_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Behind the last one this rank gives back what was gathered for them, before its engine takes that of a KV cache."""
        yield from self._weights()
        _give_back_unused()

    def _make_ready(self) -> None:
        if self._resting:  # nothing was published since: the last step changed no weights
            self._publish()

    @property
    def _follows(self) -> bool:
        """Whether another replica feeds the engine that this one samples from."""
        return self._shared and self._seats.index > 0

    def _ask(self, action: Callable[[], Any] | None) -> list[_Answer]:
        """Runs `action` where there is one and tells every rank how it went with each engine."""
        answer, error = _Answer(), None
        if action is not None:
            try:
                answer = _Answer(action())
            except EngineDied as failure:
                answer = _Answer(died=str(failure))
            except ReheatError as failure:
                error = str(failure)
        return self._seats.share(answer, error)

    def _revive(self, answers: Sequence[_Answer]) -> None:
        error = None
        self.engine_restarts += sum(a.died is not None for a in answers)
        deaths = [a.died for a in answers if a.died] if self._shared else [answers[self._seats.index].died]
        died = next(iter(deaths), None)
        if died and not self._follows and self._sampler is not None:
            try:
                self._sampler.restart()
                self._sampler.wait_ready()
            except ReheatError as failure:
                error = f"{died}; {failure}"
        self._seats.share(None, error)


class Policy(Sampler):
    """The policy in training. Its `version` is that of the trainer's weights which its engines hold."""

    def __init__(
        self,
        engine: Engine,
        topology: Topology,
        sampler: RolloutEngine | None,
        verifiers: VerifierPool | None,
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        super().__init__(engine.config.rollout, topology, sampler, verifiers, decode, engine.iter_hf_weights)
        self.engine = engine


class FrozenSampler(Sampler):
    """A model that never changes. Its engines are given the weights once, and again only where an engine lost them: they
    outlast a rest. `weights()` is no collective: it runs on the ranks that hold an engine to feed.
    """

    def _push(self) -> SyncReport:
        engine = self._sampler
        if engine is not None and engine.policy_version != self.version:
            return super()._push()
        if engine is not None and self._resting:
            engine.wake()
        return SyncReport(self.version, 0, 0, 0.0, verified=False)  # nothing was sent

    def _make_ready(self) -> None:
        held = self._seats.share(None if self._sampler is None else self._sampler.policy_version, None)
        if self._resting or any(version != self.version for version in held):
            self._publish()


def _give_back_unused() -> None:
    """What PyTorch keeps for tensors to come is memory that a waking engine cannot have."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _interleave(shares: Sequence[Sequence[T]], total: int) -> list[T]:
    """Undoes the dealing out of `sample`: replica r holds items r, r + DP, r + 2 DP, ..."""
    return [shares[i % len(shares)][i // len(shares)] for i in range(total)]
