"""A trainer of one rank whose servers are killed and stopped; whatever happens, it samples what it would have sampled."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from megatron_reheat.clock import Clock
from megatron_reheat.config import RolloutConfig
from megatron_reheat.rollout.server import process
from megatron_reheat.rollout.server.fleet import ServerFleet, _bodies
from megatron_reheat.rollout.server.servers import Servers
from megatron_reheat.rollout.server.weights import ServerWeights
from megatron_reheat.rollout.wire import SampleRequest
from megatron_reheat.stages.policy import Sampler
from megatron_reheat.types import Prompt, SamplingParams
from tests.e2e.agreement import PushedModel
from tests.unit.test_policy import ONE_RANK, AllCorrect

SAMPLED = SamplingParams(temperature=1.0, max_tokens=24)
PROMPTS = [Prompt(i, "", tuple(2 + (5 * i + 3 * j) % 120 for j in range(6 + i)), {}) for i in range(12)]
LIMIT_S = 900.0  # it only ends what hangs

Samples = list[tuple[list[int], bytes]]


class Trainer:
    """`expected` are the samples of two policies, by the seed of their weights, before anything happened."""

    def __init__(self, pushed: PushedModel, servers: Servers, vocab_size: int, config: RolloutConfig) -> None:
        self.servers = servers
        self.on_tensor: Callable[[int], None] | None = None
        self._pushed = pushed
        self._doomed: list[psutil.Process] = []
        self._left: set[Path] = set()
        weights = ServerWeights(servers, config, on_cpu=True)
        self.fleet = ServerFleet(servers, vocab_size, config, label="kills", weights=weights)
        rollout: Any = config.model_copy(update={"mode": "server"})
        topology: Any = ONE_RANK
        self.sampler = Sampler(rollout, topology, self.fleet, AllCorrect(), str, self._tensors)  # type: ignore[arg-type]
        self.expected: dict[int, Samples] = {}
        for seed in (1, 2):
            self.publish(seed)
            self.expected[seed] = self.sample()
        assert self.expected[1] != self.expected[2]

    def publish(self, seed: int) -> None:
        self._pushed.randomize(seed)
        self.sampler.publish(self.sampler.version + 1)

    def sample(self) -> Samples:
        groups = self.sampler.sample(PROMPTS, 8, SAMPLED, 3, Clock())
        assert {c.policy_version for g in groups for c in g.completions} == {self.sampler.version}
        return [(c.token_ids.tolist(), c.rollout_logprobs.tobytes()) for g in groups for c in g.completions]

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for index, named in enumerate(self._pushed.tensors()):
            if self.on_tensor is not None and not self.servers.dead:
                self.on_tensor(index)
            yield named

    def kill_while_sampling(self, url: str, seed: int) -> None:
        """Its engine; until the trainer has noticed, every round of samples is whole."""
        timer = threading.Timer(0.05, self.kill_engine, (url,))
        timer.start()
        deadline = time.monotonic() + LIMIT_S
        while not self.servers.dead:
            assert self.sample() == self.expected[seed] and time.monotonic() < deadline
        timer.join()
        assert list(self.servers.dead) == [url]

    def kill_engine(self, url: str) -> None:
        (engine,) = [p for p in self._doom(url) if "EngineCore" in p.name()]
        engine.kill()

    def kill(self, url: str) -> None:
        """What answers HTTP, alone: the engine behind it goes on by itself."""
        self._doom(url)[0].kill()

    def kill_guardian(self, url: str) -> None:
        """Nobody is left to end the server for it, which goes on."""
        self._doom(url)[0].parent().kill()

    def stop(self, url: str) -> None:
        """The engine alone: HTTP is answered, but no request that needs it."""
        for one in self._doom(url)[1:]:
            one.suspend()

    def ask(self, url: str, index: int, n: int) -> dict[str, Any]:
        """What a server answers, whatever weights it has, to one of the prompts."""
        request = SampleRequest.pack([np.array(PROMPTS[index].token_ids, np.int32)], SAMPLED, n, 3)
        client = self.servers.clients[url]
        return self.servers.network.run(client.post("inference/v1/generate", _bodies(request)[0]))

    def wait_for_another(self, url: str) -> None:
        """Until a server that is none of those that were killed is up, behind the trainer's back."""
        client = self.servers.clients[url]
        wait_until(lambda: api_process(url) not in (None, *self._doomed) and self.servers.network.run(client.answers()))

    def assert_nothing_is_left(self) -> None:
        """Of the servers that were killed, which could not remove what they had."""
        assert self._left and self._doomed
        _, alive = psutil.wait_procs(self._doomed, timeout=20)
        assert not alive
        assert not any(path.exists() for path in self._left)

    def _doom(self, url: str) -> list[psutil.Process]:
        """The processes of a server, the one that answers HTTP first."""
        first = api_process(url)
        assert first is not None
        found = [first, *first.children(recursive=True)]
        self._doomed += found
        self._left |= process._shared_memory(first.pid) | {Path(first.environ()[process.SOCKETS_VARIABLE])}
        return found


def api_process(url: str) -> psutil.Process | None:
    for one in psutil.process_iter():
        try:
            command = one.cmdline()
        except psutil.Error:
            continue
        if command[1:3] == ["-m", "megatron_reheat.rollout.server.api"] and url.rsplit(":", 1)[1] in command:
            return one if os.getsid(one.pid) == one.pid else None
    return None


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def die_in_turn(trainer: Trainer, url: str) -> None:
    """Killed while it samples; the next one while weights are sent to it; the one after it serves."""
    trainer.publish(1)
    trainer.kill_while_sampling(url, 1)
    restarts = trainer.sampler.engine_restarts

    def kill(index: int) -> None:
        if index == 20:
            trainer.on_tensor = None
            trainer.kill(url)

    trainer.on_tensor = kill
    trainer.publish(2)
    assert trainer.on_tensor is None
    assert trainer.sampler.engine_restarts == restarts + 2
    assert trainer.sample() == trainer.expected[2]
    trainer.assert_nothing_is_left()


def one_dead_and_one_stopped(trainer: Trainer, kill: Callable[[str], None], dead: str, stopped: str) -> None:
    """Between two steps: nobody is left to ask when the next one samples."""
    trainer.publish(1)
    kill(dead)
    trainer.stop(stopped)
    client, restart = trainer.servers.clients[stopped], trainer.servers.restart

    def restart_and_wait_longer() -> None:
        client._timeout_s = LIMIT_S
        restart()

    client._timeout_s = 5.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.servers, "restart", restart_and_wait_longer)
        assert trainer.sample() == trainer.expected[1]
    assert client._timeout_s == LIMIT_S
    trainer.assert_nothing_is_left()
