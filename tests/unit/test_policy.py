"""When engines are woken, fed and asked, in the order that `colocated` and `server` need; the engines here are recorders."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_reheat.clock import Clock
from megatron_reheat.config import RolloutConfig
from megatron_reheat.errors import ConfigError, EngineDied
from megatron_reheat.parallel.seats import engine_seats
from megatron_reheat.rollout.rollout_engine import SyncReport
from megatron_reheat.stages.policy import FrozenSampler, Policy
from megatron_reheat.types import Completion, Prompt, Reward, SamplingParams

PARAMS = SamplingParams(temperature=1.0, max_tokens=4)
PROMPTS = [Prompt(i, "", (i + 1,), {}) for i in range(3)]


class Recorder:
    """Answers like an engine and notes what it was asked for; `dies_at` names the call that fails once."""

    def __init__(self, dies_at: str = "") -> None:
        self.calls: list[str] = []
        self.policy_version: int | None = None
        self._dies_at = dies_at

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call == self._dies_at:
            self._dies_at = ""
            raise EngineDied("it died")

    def sleep(self) -> None:
        self._note("sleep")

    def wake(self) -> None:
        self._note("wake")

    def restart(self) -> None:
        self._note("restart")

    def wait_ready(self) -> float:
        return 0.0

    def generate(self, prompts, params, n, seed, on_finished=None):
        self._note("generate")
        completion = Completion(np.array([1], np.int32), np.zeros(1, np.float32), 1.0, self.policy_version, "stop")
        return [[completion] * n for _ in prompts]

    def update_weights(self, tensors, version, verify):
        list(tensors)
        self._note(f"weights {version}")
        self.policy_version = version
        return SyncReport(version, 1, 4, 0.0, verify)


class AllCorrect:
    """A pool, and each of its gradings."""

    while_sampling = True

    def begin(self):
        return self

    def settle(self): ...

    def add(self, items):
        return [Reward(1.0, True, False) for _ in items]

    def rewards(self, tasks):
        return tasks


ONE_RANK = SimpleNamespace(
    rank=0, world_size=1, local_world_size=1, replica_rank=0, num_replicas=1, is_replica_leader=True,
    share_from_leaders=lambda mine, error=None: [mine], share_from_all=lambda mine, error=None: [mine],
)  # fmt: skip


def make_policy(mode: str, recorder: Recorder) -> Policy:
    engine = SimpleNamespace(
        config=SimpleNamespace(rollout=RolloutConfig(mode=mode)), iter_hf_weights=lambda: iter([("w", torch.zeros(1))])
    )
    return Policy(engine, ONE_RANK, recorder, AllCorrect(), decode=str)


class Frozen(Recorder):
    """Keeps its weights while it sleeps, and loses them when it dies."""

    def _note(self, call: str) -> None:
        try:
            super()._note(call)
        except EngineDied:
            self.policy_version = None
            raise


def make_frozen(mode: str, recorder: Recorder) -> FrozenSampler:
    def weights():
        recorder.calls.append("read")
        return iter([("w", torch.zeros(1))])

    return FrozenSampler(RolloutConfig(mode=mode), ONE_RANK, recorder, AllCorrect(), str, weights)


@pytest.mark.parametrize("kind", ["policy", "frozen"])
def test_the_trainers_unused_memory_is_free_before_an_engine_wakes(kind: str, monkeypatch: pytest.MonkeyPatch):
    recorder = Frozen()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: recorder.calls.append("empty cache"))
    sampler = (make_policy if kind == "policy" else make_frozen)("colocated", recorder)
    sampler.publish(1)
    sampler.rest()
    sampler.sample(PROMPTS, 1, PARAMS, 0, Clock())
    since = recorder.calls[recorder.calls.index("sleep") :]
    assert since[:3] == ["sleep", "empty cache", "wake"]
    if kind == "policy":  # once more for the KV cache, which wakes when all weights have come
        assert since[3:5] == ["empty cache", "weights 1"]
    assert recorder.calls.count("empty cache") == 1 + (kind == "policy")


def test_a_frozen_model_is_read_and_sent_once():
    recorder = Frozen()
    frozen = make_frozen("colocated", recorder)
    assert frozen.publish(0).verified
    frozen.rest()
    for seed in range(2):
        frozen.sample(PROMPTS, 1, PARAMS, seed, Clock())
        frozen.rest()
    turn = ["wake", "generate", "sleep"]
    assert recorder.calls == ["read", "weights 0", "sleep", *turn, *turn]


@pytest.mark.parametrize("call", ["sleep", "wake", "generate"])
@pytest.mark.parametrize("mode", ["colocated", "embedded"])
def test_a_frozen_engine_that_dies_at_any_point_is_given_the_weights_again(mode, call):
    recorder = Frozen(dies_at=call)
    frozen = make_frozen(mode, recorder)
    frozen.publish(0)
    for seed in range(2):
        frozen.rest()
        groups = frozen.sample(PROMPTS, 2, PARAMS, seed, Clock())
        assert [len(g.completions) for g in groups] == [2, 2, 2]
    dies = mode == "colocated" or call == "generate"
    assert recorder.calls.count("weights 0") == recorder.calls.count("read") == (2 if dies else 1)
    assert frozen.engine_restarts == (
        dies and call != "sleep"
    )  # found dead by the next call, which restarts a real one


def test_items_are_divided_and_come_back_in_order():
    policy = make_policy("embedded", Recorder())
    assert policy.divide([3, 1, 2], lambda mine: (2 * item for item in mine)) == [6, 2, 4]
    graded = policy.grade(
        PROMPTS, [(Completion(np.array([1], np.int32), np.zeros(1, np.float32), 1.0, 0, "stop"),)] * 3, Clock()
    )
    assert [(g.prompt.index, len(g.completions), g.accuracy) for g in graded] == [(0, 1, 1.0), (1, 1, 1.0), (2, 1, 1.0)]


def test_a_colocated_engine_sleeps_while_training_and_is_fed_before_it_samples_again():
    recorder = Recorder()
    policy = make_policy("colocated", recorder)
    policy.publish(1)
    policy.sample(PROMPTS, 2, PARAMS, 0, Clock())
    policy.sample(PROMPTS, 2, PARAMS, 1, Clock())  # dynamic sampling: no sleep between
    policy.rest()
    policy.rest()
    policy.publish(2)
    policy.sample(PROMPTS, 2, PARAMS, 2, Clock())
    assert recorder.calls == ["weights 1", "generate", "generate", "sleep", "wake", "weights 2", "generate"]


def test_weights_dropped_for_a_step_that_changed_none_are_sent_again():
    recorder = Recorder()
    policy = make_policy("colocated", recorder)
    policy.publish(1)
    policy.rest()
    (group, *_) = policy.sample(PROMPTS, 1, PARAMS, 0, Clock())
    assert recorder.calls == ["weights 1", "sleep", "wake", "weights 1", "generate"]
    assert group.completions[0].policy_version == 1


def test_an_engine_beside_the_trainer_is_never_put_to_sleep():
    recorder = Recorder()
    policy = make_policy("embedded", recorder)
    policy.publish(1)
    policy.rest()
    policy.sample(PROMPTS, 1, PARAMS, 0, Clock())
    assert recorder.calls == ["weights 1", "generate"]


@pytest.mark.parametrize("call", ["sleep", "wake", "weights 2", "generate"])
def test_an_engine_that_dies_at_any_point_is_restarted_fed_and_asked_again(call):
    recorder = Recorder(dies_at=call)
    policy = make_policy("colocated", recorder)
    policy.publish(1)
    policy.rest()
    policy.publish(2)
    groups = policy.sample(PROMPTS, 2, PARAMS, 0, Clock())
    assert len(groups) == 3 and all(len(g.completions) == 2 for g in groups)
    assert groups[0].completions[0].policy_version == 2
    if call != "sleep":  # an engine that could not go to sleep is found dead by the next call
        assert policy.engine_restarts == 1 and "restart" in recorder.calls


def test_weights_wait_for_what_is_being_sampled_ahead():
    recorder = Recorder()
    policy = make_policy("server", recorder)
    policy.publish(1)
    sampling, go_on = threading.Event(), threading.Event()
    generate = recorder.generate

    def slow(*arguments):
        sampling.set()
        assert go_on.wait(20)
        return generate(*arguments)

    recorder.generate = slow
    order = policy.begin(PROMPTS, 2, PARAMS, 0)
    assert sampling.wait(20)  # beside this thread, which is free to train
    publisher = threading.Thread(target=policy.publish, args=(2,))
    publisher.start()
    publisher.join(0.2)
    assert publisher.is_alive() and recorder.calls == ["weights 1"]
    go_on.set()
    publisher.join(20)
    groups = policy.finish(order, Clock())
    assert recorder.calls == ["weights 1", "generate", "weights 2"]
    assert {c.policy_version for g in groups for c in g.completions} == {1}


def test_what_was_lost_while_sampling_ahead_is_sampled_again_with_todays_weights():
    recorder = Recorder(dies_at="generate")
    policy = make_policy("server", recorder)
    policy.publish(1)
    order = policy.begin(PROMPTS, 2, PARAMS, 0)
    policy.publish(2)
    groups = policy.finish(order, Clock())
    assert recorder.calls == ["weights 1", "generate", "weights 2", "restart", "weights 2", "generate"]
    assert len(groups) == 3 and {c.policy_version for g in groups for c in g.completions} == {2}


@pytest.mark.parametrize(("mode", "tensor", "expected"), [
    ("embedded", 1, [(0, 2, True), (0, 2, False), (1, 2, True), (1, 2, False)]),
    ("server", 2, [(0, 2, True), (0, 2, False), (1, 2, True), (1, 2, False)]),
    ("colocated", 1, [(0, 4, True), (1, 4, True), (2, 4, True), (3, 4, True)]),
    ("colocated", 2, [(0, 2, True), (0, 2, False), (1, 2, True), (1, 2, False)]),
    ("colocated", 4, [(0, 1, True), (0, 1, False), (0, 1, False), (0, 1, False)]),
])  # fmt: skip
def test_which_of_four_ranks_hold_an_engine(mode, tensor, expected):
    """Two replicas of two ranks each."""
    ranks = [
        SimpleNamespace(
            rank=r, world_size=4, local_world_size=4, replica_rank=r // 2, num_replicas=2, is_replica_leader=r % 2 == 0,
            share_from_leaders=None, share_from_all=lambda mine, error: ["a", "b", "c", "d"],
        )
        for r in range(4)
    ]  # fmt: skip
    seats = [engine_seats(rank, RolloutConfig(mode=mode, tensor=tensor)) for rank in ranks]
    assert [(s.index, s.count, s.is_leader) for s in seats] == expected
    if mode == "colocated":
        assert seats[0].share("a", None) == ["a", "b", "c", "d"][::tensor]


def test_engines_that_do_not_fit_a_node_are_refused():
    rank = SimpleNamespace(rank=0, world_size=8, local_world_size=4)
    with pytest.raises(ConfigError, match=r"rollout\.tensor 3 does not divide the 4 ranks of a node"):
        engine_seats(rank, RolloutConfig(mode="colocated", tensor=3))
