"""The vLLM servers of a run: started here or already running, checked, talked to together, started again when they fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from transformers import PretrainedConfig

from megatron_reheat.config import RolloutConfig
from megatron_reheat.errors import ConfigError, EngineDied
from megatron_reheat.rollout.server.client import Network, ServerClient, ServerInfo
from megatron_reheat.rollout.server.process import ServerProcess, policy_shape
from megatron_reheat.rollout.vllm_version import OLDEST, is_too_old

POLL_S = 0.2


class Servers:
    """Starts what `processes` makes at once; `wait_ready` or the first use waits.

    Args:
        urls: of all servers.
        processes: makes the process of a server of ours, by URL; empty where all are somebody else's.
        hf: the policy's Hugging Face config, which every server must serve.
        backend: the weight transfer every server must have been started with.
    """

    def __init__(
        self,
        urls: Sequence[str],
        processes: Mapping[str, Callable[[], ServerProcess]],
        config: RolloutConfig,
        hf: PretrainedConfig,
        backend: str,
    ) -> None:
        self._config = config
        self._hf = hf
        self._backend = backend
        self._make_process = processes
        self._started_at = time.perf_counter()
        self._start_seconds: float | None = None
        self._restarts = 0
        self._processes = {url: make() for url, make in processes.items()}
        self.network = Network()
        self.clients = {url: self.network.client(url, config.timeout_s) for url in urls}
        self.info: dict[str, ServerInfo] = {}
        self.dead: dict[str, EngineDied] = {}

    @property
    def alive(self) -> list[ServerClient]:
        """Those that have not failed since the last `restart`."""
        return [client for url, client in self.clients.items() if url not in self.dead]

    @property
    def pids(self) -> list[int]:
        """Of the processes of ours."""
        return [process.pid for process in self._processes.values()]

    def wait_ready(self) -> float:
        """Waits until every server serves this policy; returns the seconds since this object was made until then.

        Raises:
            EngineDied: one ended, or was not ready within `rollout.start_timeout_s`.
            ConfigError: one serves another model, or was started without something that training needs.
        """
        if self._start_seconds is None:
            self._wait(self.clients)
            self._start_seconds = time.perf_counter() - self._started_at
        return self._start_seconds

    def restart(self) -> None:
        """Starts those failed servers anew that are ours, and waits for the others to be back.

        Raises:
            EngineDied: after `rollout.max_restarts` restarts, or when a server does not come back.
        """
        if self._restarts >= self._config.max_restarts:
            raise EngineDied(f"vLLM servers were restarted {self._restarts} times (rollout.max_restarts)")
        self._restarts += 1
        failed = [url for url in self.clients if url in self.dead or not self._is_up(url)]
        for url in failed:
            if url in self._processes:
                self._processes[url].end()
                self._processes[url] = self._make_process[url]()
        self._wait(failed)
        self.dead.clear()

    def post(self, route: str, body: Any = None, *, fail_fast: bool = False) -> Future[None]:
        """Posts to every server at once; the future is done when all have answered.

        With `fail_fast` it is done as soon as one fails: the others may be waiting for that one. `body` may be a function of
        the server's URL. A server that turns out to be gone is put down as dead.
        """

        async def post_all() -> None:
            posts = (self._post(client, route, body) for client in self.clients.values())
            results = await asyncio.gather(*posts, return_exceptions=not fail_fast)
            for result in results:
                if isinstance(result, BaseException):
                    raise result

        return self.network.start(post_all())

    def close(self) -> None:
        self.network.close()
        for process in self._processes.values():
            process.ask_to_end()
        for process in self._processes.values():
            process.end()

    async def _post(self, client: ServerClient, route: str, body: Any) -> None:
        try:
            await client.post(route, body(client.url) if callable(body) else body)
        except EngineDied as error:
            if not await client.is_ready():
                self.dead[client.url] = error
            raise

    def _is_up(self, url: str) -> bool:
        process = self._processes.get(url)
        return (process is None or process.alive) and self.network.run(self.clients[url].is_ready())

    def _wait(self, urls: Iterable[str]) -> None:
        deadline = time.perf_counter() + self._config.start_timeout_s
        for url in urls:
            while not self._is_up(url):
                process = self._processes.get(url)
                late = time.perf_counter() > deadline
                if process is not None and (late or not process.alive):
                    raise process.death()
                if late:
                    raise EngineDied(
                        f"vLLM server {url} is not ready after {self._config.start_timeout_s:g} s "
                        "(rollout.start_timeout_s); check rollout.servers, and that the server runs"
                    )
                time.sleep(POLL_S)
            self.info[url] = self.network.run(self.clients[url].describe())
            self._check(url, self.info[url])

    def _check(self, url: str, info: ServerInfo) -> None:
        ours, needed, problem = policy_shape(self._hf), self._config.max_model_len, None
        if is_too_old(info.version):
            problem = f"runs vLLM {info.version}; weights are sent in place to {OLDEST} and later"
        elif info.shape is not None and info.shape != ours:
            problem = (
                f"serves {info.model} with {_listed(info.shape)}, but model.hf_path has {_listed(ours)}; start it from "
                "this recipe (reheat serve)"
            )
        elif info.transfer_backend != self._backend:
            problem = (
                f"takes weights over {info.transfer_backend}, this trainer sends them over {self._backend}; start it "
                f"""with --weight-transfer-config '{{"backend": "{self._backend}"}}' (reheat serve does)"""
            )
        elif info.logprobs_mode != "processed_logprobs":
            problem = f"returns {info.logprobs_mode}; start it with --logprobs-mode processed_logprobs"
        elif needed is not None and info.max_model_len < needed:
            problem = (
                f"has a context of {info.max_model_len} tokens, this run needs {needed} (rollout.max_model_len); start "
                "it with --max-model-len"
            )
        if problem:
            raise ConfigError(f"rollout.servers: {url} {problem}")


def _listed(shape: Mapping[str, int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in shape.items())
