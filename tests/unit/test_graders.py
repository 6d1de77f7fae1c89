"""Responses that are graded while others are still being sampled; the engine here hands them over as the test says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_reheat.clock import Clock
from megatron_reheat.config import RewardConfig, RolloutConfig
from megatron_reheat.errors import EngineDied, ReheatError
from megatron_reheat.rewards.pool import VerifierPool
from megatron_reheat.rollout.rollout_engine import SyncReport
from megatron_reheat.stages.policy import Policy
from megatron_reheat.types import Completion, Prompt, SamplingParams
from tests.unit.test_policy import ONE_RANK

PATIENCE_S = 120.0
PARAMS = SamplingParams(temperature=1.0, max_tokens=4)
# a response is its number in text. Each grade is written down as a line of `events`; a response takes its time as long as a
# file of its name lies beside them
FUNCTIONS = """
import time
from pathlib import Path

HERE = Path(__file__).parent

def score(response, record):
    with open(HERE / "events", "a") as events:
        events.write(f"graded {response}\\n")
    while (HERE / response).exists():
        time.sleep(0.01)
    return float(response) + record["base"]
"""
PROMPTS = [Prompt(i, "", (i + 1,), {"record": {"base": 100 * i}, "where": "r"}) for i in range(3)]


def wait_until(condition: Callable[[], Any]) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up, "it never came"
        time.sleep(0.01)


class Bench:
    """A pool with one worker, and the events in the order in which they happened."""

    def __init__(self, folder: Path, **reward: Any) -> None:
        self.folder = folder
        (folder / "own.py").write_text(FUNCTIONS)
        config = {"workers": 1, "sandbox": False, "function": f"{folder}/own.py:score", "timeout_s": PATIENCE_S}
        self.pool = VerifierPool(RewardConfig(**config | reward))

    @property
    def events(self) -> list[str]:
        path = self.folder / "events"
        return path.read_text().split("\n")[:-1] if path.exists() else []

    def note(self, event: str) -> None:
        with open(self.folder / "events", "a") as events:
            events.write(f"{event}\n")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**reward: Any) -> Bench:
        made.append(Bench(tmp_path, **reward))
        return made[-1]

    yield make
    for one in made:
        one.pool.close()


class Engine:
    """Samples 10 p + i for sample i of prompt p, the last prompt first. `on_the_way` is called before the last of all is
    finished; what it raises ends the call."""

    policy_version = 0

    def __init__(self, on_the_way: Callable[[], None]) -> None:
        self.on_the_way = on_the_way
        self.handed_over: list[bool] = []
        self.restarts = 0

    def generate(self, prompts, params, n, seed, on_finished=None):
        self.handed_over.append(on_finished is not None)
        groups: list[list[Any]] = [[None] * n for _ in prompts]
        places = [(p, i) for p in reversed(range(len(prompts))) for i in reversed(range(n))]
        for p, i in places:
            if (p, i) == places[-1]:
                self.on_the_way()
            groups[p][i] = Completion(np.array([10 * p + i], np.int32), np.zeros(1, np.float32), 1.0, 0, "stop")
            if on_finished is not None:
                on_finished(p, i, groups[p][i])
        return groups

    def restart(self) -> None:
        self.restarts += 1

    def wait_ready(self) -> float:
        return 0.0

    def update_weights(self, tensors, version, verify):
        list(tensors)
        return SyncReport(version, 1, 4, 0.0, verify)


def make_policy(engine: Engine, pool: VerifierPool) -> Policy:
    trainer = SimpleNamespace(
        config=SimpleNamespace(rollout=RolloutConfig(mode="server")),
        iter_hf_weights=lambda: iter([("w", torch.zeros(1))]),
    )
    return Policy(trainer, ONE_RANK, engine, pool, decode=lambda ids: str(ids[0]))  # type: ignore[arg-type]


def values(groups) -> list[list[float]]:
    return [[r.value for r in g.rewards] for g in groups]


IN_ORDER = [[0.0, 1.0], [110.0, 111.0], [220.0, 221.0]]


@pytest.mark.parametrize("ahead", [False, True])
def test_what_is_finished_early_is_graded_before_the_last_is_sampled(bench, ahead: bool) -> None:
    b = bench()

    def until_the_others_are_graded() -> None:
        wait_until(lambda: len(b.events) == 5)
        b.note("sampled the last")

    policy = make_policy(Engine(until_the_others_are_graded), b.pool)
    if ahead:
        groups = policy.finish(policy.begin(PROMPTS, 2, PARAMS, 0), Clock())
    else:
        groups = policy.sample(PROMPTS, 2, PARAMS, 0, Clock())
    assert b.events == [*(f"graded {n}" for n in (21, 20, 11, 10, 1)), "sampled the last", "graded 0"]
    assert values(groups) == IN_ORDER


def test_all_after_the_last_where_that_is_asked_for(bench) -> None:
    b = bench(while_sampling=False)
    engine = Engine(lambda: b.note("sampled the last"))
    groups = make_policy(engine, b.pool).sample(PROMPTS, 2, PARAMS, 0, Clock())
    assert engine.handed_over == [False]
    assert b.events == ["sampled the last", *(f"graded {n}" for n in (0, 1, 10, 11, 20, 21))]
    assert values(groups) == IN_ORDER


def test_an_engine_that_dies_on_the_way_has_nothing_graded_twice(bench) -> None:
    b, deaths = bench(), [EngineDied("it died")]

    def die_once() -> None:
        wait_until(lambda: len(b.events) == 5)
        if deaths:
            raise deaths.pop()

    engine = Engine(die_once)
    policy = make_policy(engine, b.pool)
    policy.publish(0)
    assert values(policy.sample(PROMPTS, 2, PARAMS, 0, Clock())) == IN_ORDER
    assert engine.restarts == 1 and sorted(b.events) == sorted(f"graded {n}" for n in (0, 1, 10, 11, 20, 21))


def test_a_time_limit_that_passes_beside_sampling_counts_for_nothing(bench) -> None:
    b = bench(timeout_s=4.0)
    verifier = PROMPTS[0].verifier
    b.pool.grade([("0", verifier)])  # so that the worker has started
    (b.folder / "3").touch()
    grading = b.pool.begin()
    tasks = grading.add([("3", verifier), ("4", verifier)])
    wait_until(lambda: grading.lost)
    (b.folder / "3").unlink()
    assert [(r.value, r.timed_out) for r in grading.rewards(tasks)] == [(3.0, False), (4.0, False)]
    assert b.events.count("graded 3") == 2 and b.pool.timeouts == 0

    (b.folder / "5").touch()
    grading = b.pool.begin()
    tasks = grading.add([("5", verifier)])
    wait_until(lambda: "graded 5" in b.events)  # it is under way as sampling ends, and has its time again
    assert [r.timed_out for r in grading.rewards(tasks)] == [True]
    assert b.events.count("graded 5") == 2 and b.pool.timeouts == 1


def test_what_somebody_waits_for_comes_before_what_is_graded_beside(bench) -> None:
    b = bench()
    verifier, other = PROMPTS[0].verifier, PROMPTS[1].verifier
    (b.folder / "0").touch()
    beside = b.pool.begin()
    tasks = beside.add([(str(n), verifier) for n in range(40)])
    wait_until(lambda: "graded 0" in b.events)
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.extend(r.value for r in b.pool.grade([("7", other)])))
    thread.start()
    wait_until(lambda: b.pool._settled)
    (b.folder / "0").unlink()
    thread.join(PATIENCE_S)
    assert found == [107.0] and b.events.index("graded 7", 8) == 16  # after the chunk that the worker had
    assert [r.value for r in beside.rewards(tasks)] == [float(n) for n in range(40)]


def test_a_pool_that_is_closed_meanwhile_says_so_and_starts_nothing_for_what_comes_late(bench) -> None:
    b = bench()
    (b.folder / "0").touch()
    grading = b.pool.begin()
    tasks = grading.add([("0", PROMPTS[0].verifier)])
    wait_until(lambda: b.events)
    b.pool.close()
    tasks += grading.add([("1", PROMPTS[0].verifier)])
    assert b.pool._thread is None
    with pytest.raises(ReheatError, match="ended before they had graded everything"):
        grading.rewards(tasks)
    assert b.pool.worker_pids == [] and b.events == ["graded 0"]
    assert b.pool.grade([("1", PROMPTS[0].verifier)])[0].value == 1.0  # a later one starts workers again


def test_a_pool_that_fails_beside_sampling_ends_the_step_and_not_the_sampling(bench) -> None:
    def share(mine: Any, error: str | None) -> list[Any]:
        if error:
            raise ReheatError(error)
        return [mine]

    b = bench(function="no_such_module:score")
    policy = make_policy(Engine(lambda: wait_until(lambda: b.pool._thread is None)), b.pool)
    policy._seats = replace(policy._seats, share=share)
    with pytest.raises(ReheatError, match="no_such_module"):
        policy.sample(PROMPTS, 2, PARAMS, 0, Clock())
