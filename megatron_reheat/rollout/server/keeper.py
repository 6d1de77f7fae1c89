"""Keeps vLLM servers of this machine running: one that ends by itself, or hangs, is started again at the same address.

It comes back without weights, which its trainer notices by their label.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from megatron_reheat.config import RolloutConfig
from megatron_reheat.rollout.server.client import ANSWER_WAIT_S, Network, ServerClient
from megatron_reheat.rollout.server.process import ServerProcess
from megatron_reheat.rollout.server.restarts import RestartLimit
from megatron_reheat.rollout.server.servers import POLL_S

LOOK_S = 1.0


class Keeper:
    """`watch` starts the servers and looks after them, `end` ends them, whatever happened.

    Args:
        starters: what starts each server, by the URL that is printed for it.
        host: where they are reached from this machine, as a part of a URL.
        token: what they ask for.
    """

    def __init__(
        self,
        starters: Mapping[str, Callable[[], ServerProcess]],
        host: str,
        config: RolloutConfig,
        *,
        token: str | None = None,
    ) -> None:
        self._starters, self._host, self._config = starters, host, config
        self._network = Network(token)
        self._servers: list[_Kept] = []

    def watch(self, stop: threading.Event) -> None:
        """Returns when `stop` is set.

        Raises:
            EngineDied: a server ended, or was late, before it was ready; or once more than it may be started again.
        """
        for url, start in self._starters.items():
            process = start()
            client = self._network.client(f"http://{self._host}:{process.port}", self._config.timeout_s)
            self._servers.append(_Kept(url, start, process, client, self._network, self._config))
        while not stop.wait(POLL_S):
            for server in self._servers:
                server.look()

    def end(self) -> None:
        """Ends all servers at once and returns when they have ended."""
        self._network.close()
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda server: server.process.end(), self._servers))


class _Kept:
    """One server, whose engine is asked for a sign of life every `LOOK_S`; `_silent_s` is how long it gave none."""

    _started: float
    _asked: float
    _silent_s: float
    _is_ready: bool
    _question: Future[bool] | None

    def __init__(
        self,
        url: str,
        start: Callable[[], ServerProcess],
        process: ServerProcess,
        client: ServerClient,
        network: Network,
        config: RolloutConfig,
    ) -> None:
        self.process = process
        self._url, self._start, self._client, self._network = url, start, client, network
        self._start_timeout_s = config.start_timeout_s
        # a trainer waits for rollout.start_timeout_s, which is to be enough for this and a start
        self._hang_s = min(config.timeout_s, config.start_timeout_s / 2)
        self._limit = RestartLimit(config.max_restarts)
        self._wait_for_it()

    def look(self) -> None:
        now = time.monotonic()
        if self._question is None and now >= self._asked + LOOK_S:
            self._question, self._asked = self._network.start(self._client.answers()), now
        elif self._question is not None and self._question.done():
            self._hear(self._question.result(), now)
            self._question = None
        if not self.process.alive:
            if not self._is_ready:
                raise self.process.death(f"{self.process.fate} before it was ready")
            self._start_again(self.process.fate)
        elif not self._is_ready and now - self._started > self._start_timeout_s:
            raise self.process.death()
        elif self._is_ready and self._silent_s >= self._hang_s:
            self._start_again(f"did not answer for {self._hang_s:g} s and was ended")

    def _hear(self, answered: bool, now: float) -> None:
        if not answered:
            # what the clock says counts only as far as somebody was waiting: this process may have been stopped itself
            self._silent_s += min(max(now - self._asked, LOOK_S), ANSWER_WAIT_S)
            return
        self._silent_s = 0.0
        if not self._is_ready:
            self._is_ready = True
            print(f"{self._url} ready after {now - self._started:.0f} s", flush=True)

    def _start_again(self, why: str) -> None:
        number = self._limit.take()
        if number is None:
            raise self.process.death(f"{why}; it has had its {self._limit}")
        self.process.end()
        print(f"{self._url} {why}; started again, number {number} of {self._limit}", flush=True)
        self.process = self._start()
        self._wait_for_it()

    def _wait_for_it(self) -> None:
        self._started = self._asked = time.monotonic()
        self._silent_s = 0.0
        self._is_ready = False
        self._question = None
