"""How an evaluation deals problems out over its engines, and what it does when one dies; the engines here are stand-ins."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_reheat.config import RolloutConfig
from megatron_reheat.errors import EngineDied
from megatron_reheat.evaluation import evaluate as evaluation
from megatron_reheat.rollout.rollout_engine import SyncReport
from megatron_reheat.types import Prompt, SamplingParams
from tests.e2e import runs

PARAMS = SamplingParams(temperature=1.0, max_tokens=8)
PROMPTS = [Prompt(i, "", (i, i), {}) for i in range(7)]


class StandIn:
    """Answers a prompt with its first token; dies in its first `deaths` calls of generate."""

    deaths = 0

    def __init__(self, *_: Any, log_file: Path, **__: Any) -> None:
        self.name = log_file.stem
        self.policy_version: int | None = None
        self.loaded: list[list[str]] = []
        self.restarted_in: list[str] = []
        self.closed = False
        self.deaths = type(self).deaths if self.name == "vllm-1" else 0

    def update_weights(self, tensors: Iterator[Any], version: int, verify: bool) -> SyncReport:
        self.loaded.append([name for name, _ in tensors])
        self.policy_version = version
        return SyncReport(version, len(self.loaded[-1]), 0, 0.0, verify)

    def generate(self, prompts: list[Any], params: SamplingParams, n: int, seed: int) -> list[list[Any]]:
        assert self.policy_version is not None
        if self.deaths:
            self.deaths -= 1
            self.policy_version = None
            raise EngineDied(f"{self.name} died")
        return [[(prompt[0], self.name, seed)] * n for prompt in prompts]

    def restart(self) -> None:
        self.restarted_in.append(threading.current_thread().name)
        if len(self.restarted_in) > 2:
            raise EngineDied("rollout.max_restarts")

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.setattr(evaluation, "EmbeddedEngine", StandIn)
    model = evaluation._read_model(str(runs.make_model_folder(tmp_path / "model")))
    with evaluation._Replicas(model, RolloutConfig(), 3, tmp_path) as replicas:
        yield replicas
    assert all(engine.closed for engine in replicas._engines)


def test_answers_come_in_the_order_of_the_prompts(replicas: Any) -> None:
    samples = replicas.sample(PROMPTS, PARAMS, 2, 10)
    assert samples == [[(i, f"vllm-{i % 3}", 10 + i % 3)] * 2 for i in range(7)]
    assert replicas.sample(PROMPTS[:1], PARAMS, 1, 0) == [[(0, "vllm-0", 0)]]
    for engine in replicas._engines:
        (names,) = engine.loaded  # once, and what the architecture needs: a tied head is not sent
        assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def test_a_dead_engine_is_replaced_by_the_main_thread_and_asked_again(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(StandIn, "deaths", 2)
    replicas = request.getfixturevalue("replicas")
    assert [sample[0][0] for sample in replicas.sample(PROMPTS, PARAMS, 1, 0)] == list(range(7))
    # an engine ends with the thread that started it
    assert [engine.restarted_in for engine in replicas._engines] == [[], ["MainThread"] * 2, []]
    assert [len(engine.loaded) for engine in replicas._engines] == [1, 3, 1]


def test_an_engine_that_keeps_dying_ends_the_evaluation(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(StandIn, "deaths", 99)
    replicas = request.getfixturevalue("replicas")
    with pytest.raises(EngineDied, match=r"rollout\.max_restarts"):
        replicas.sample(PROMPTS, PARAMS, 1, 0)
