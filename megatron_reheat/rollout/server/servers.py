"""The vLLM servers of a run: started here or already running, checked, talked to together, started again when they fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from transformers import PretrainedConfig

from megatron_reheat.config import RolloutConfig
from megatron_reheat.errors import ConfigError, EngineDied, EngineStuck, ReheatError
from megatron_reheat.rollout.server.client import Network, ServerClient, ServerInfo
from megatron_reheat.rollout.server.process import ServerProcess, policy_shape
from megatron_reheat.rollout.server.restarts import RestartLimit
from megatron_reheat.rollout.vllm_version import OLDEST, is_too_old

POLL_S = 0.2
SETTLE_S = 10.0


class Servers:
    """Starts what `processes` makes at once; `wait_ready` or the first use waits.

    Args:
        urls: of all servers. Those of others are asked at once whether they are vLLM's, if they answer yet.
        processes: makes the process of a server of ours, by URL; empty where all are somebody else's.
        hf: the model's Hugging Face config, which every server must serve.
        backend: the weight transfer every server must have been started with.
        token: what the servers ask for.
        keys: of the recipe, for errors: what names the servers, and what the model.
    """

    def __init__(
        self,
        urls: Sequence[str],
        processes: Mapping[str, Callable[[], ServerProcess]],
        config: RolloutConfig,
        hf: PretrainedConfig,
        backend: str,
        *,
        token: str | None = None,
        keys: tuple[str, str] = ("rollout.servers", "model.hf_path"),
    ) -> None:
        self.key, self._model_key = keys
        self._config = config
        self._hf = hf
        self._backend = backend
        self._make_process = processes
        self._started_at = time.monotonic()
        self._start_seconds: float | None = None
        self._limits = {url: RestartLimit(config.max_restarts) for url in urls}
        self._processes = {url: make() for url, make in processes.items()}
        self._posts: list[asyncio.Task[None]] = []
        self.network = Network(token)
        self.clients = {url: self.network.client(url, config.timeout_s) for url in urls}
        self.info: dict[str, ServerInfo] = {}
        self.dead: dict[str, EngineDied] = {}
        self._refuse_strangers()

    @property
    def alive(self) -> list[ServerClient]:
        """Those that have not failed since the last `restart`."""
        return [client for url, client in self.clients.items() if url not in self.dead]

    def wait_ready(self) -> float:
        """Waits until every server serves this policy; returns the seconds since this object was made until then.

        Raises:
            EngineDied: one of ours ended too often, or was not ready within `rollout.start_timeout_s`.
            ReheatError: nor was one of somebody else's.
            ConfigError: one serves another model, or was started without something that training needs.
        """
        if self._start_seconds is None:
            self._wait(self.clients)
            self._start_seconds = time.monotonic() - self._started_at
        return self._start_seconds

    def restart(self) -> None:
        """Starts those failed servers anew that are ours, and waits for the others to be started again where they are kept.

        Raises:
            ReheatError: more than `rollout.max_restarts` restarts of one within an hour, or one does not come back.
        """
        failed = [url for url in self.clients if url in self.dead or not self._answers(url)]
        for url in failed or self.clients:  # a failure that shows nowhere must not be repeated without end
            if self._limits[url].take() is None:
                raise EngineDied(f"vLLM server {url} has had its {self._limits[url]}")
        ours = [url for url in failed if url in self._processes]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda url: self._processes[url].end(), ours))
        for url in failed:
            if url in ours:
                self._processes[url] = self._make_process[url]()
            elif isinstance(self.dead.get(url, EngineStuck()), EngineStuck):
                self.network.run(self.clients[url].ask_to_end())
        self._wait(failed)
        self.dead.clear()

    def find_dead(self) -> None:
        """Puts down as dead what does not answer, once the posts under way have come to their ends."""

        async def ask(client: ServerClient) -> None:
            if not await client.answers():
                self.dead[client.url] = EngineStuck(f"vLLM server {client.url} does not answer")

        async def ask_all() -> None:
            if self._posts:
                await asyncio.wait(self._posts, timeout=SETTLE_S)
            await asyncio.gather(*map(ask, self.alive))

        self.network.run(ask_all())

    def post(self, route: str, body: Any = None, *, fail_fast: bool = False) -> Future[None]:
        """Posts to every server at once; the future is done when all have answered.

        With `fail_fast` it is done as soon as one fails: the others may be waiting for that one. `body` may be a function of
        the server's URL. A server that turns out to be gone is put down as dead.
        """

        async def post_all() -> None:
            self._posts = [asyncio.ensure_future(self._post(client, route, body)) for client in self.clients.values()]
            results = await asyncio.gather(*self._posts, return_exceptions=not fail_fast)
            for result in results:
                if isinstance(result, BaseException):
                    raise result

        return self.network.start(post_all())

    def close(self) -> None:
        """Ends the servers of ours and leaves those of others running."""
        self.network.close()
        for process in self._processes.values():
            process.ask_to_end()
        for process in self._processes.values():
            process.end()

    async def _post(self, client: ServerClient, route: str, body: Any) -> None:
        try:
            await client.post(route, body(client.url) if callable(body) else body)
        except EngineDied as error:
            if isinstance(error, EngineStuck) or not await client.answers():
                self.dead[client.url] = error
            raise

    def _refuse_strangers(self) -> None:
        """Before the model is loaded: what is no vLLM server will not become one while somebody waits for it."""

        async def ask_all() -> None:
            await asyncio.gather(
                *(c.refuse_stranger() for url, c in self.clients.items() if url not in self._processes)
            )

        try:
            self.network.run(ask_all())
        except ConfigError:
            self.close()
            raise

    def _answers(self, url: str) -> bool:
        process = self._processes.get(url)
        return (process is None or process.alive) and self.network.run(self.clients[url].answers())

    def _wait(self, urls: Iterable[str]) -> None:
        deadline = time.monotonic() + self._config.start_timeout_s
        for url in urls:
            while (info := self._look_at(url)) is None:
                process = self._processes.get(url)
                late = time.monotonic() > deadline
                if process is not None and late:
                    raise process.death()
                if process is not None and not process.alive:
                    if self._limits[url].take() is None:
                        raise process.death(f"{process.fate}; it has had its {self._limits[url]}")
                    process.end()
                    self._processes[url] = self._make_process[url]()
                if late:
                    raise ReheatError(
                        f"vLLM server {url} is not ready after {self._config.start_timeout_s:g} s "
                        f"(rollout.start_timeout_s); check {self.key}, and that the server runs"
                    )
                time.sleep(POLL_S)
            self.info[url] = info
            self._check(url, info)

    def _look_at(self, url: str) -> ServerInfo | None:
        """What a server says of itself, None as long as it is not up."""
        process, client = self._processes.get(url), self.clients[url]
        if process is not None and not process.alive:
            return None
        try:
            return self.network.run(client.describe()) if self.network.run(client.is_ready()) else None
        except EngineDied:
            return None

    def _check(self, url: str, info: ServerInfo) -> None:
        ours, needed, problem = policy_shape(self._hf), self._config.max_model_len, None
        if is_too_old(info.version):
            problem = f"runs vLLM {info.version}; weights are sent in place to {OLDEST} and later"
        elif info.shape is not None and info.shape != ours:
            problem = (
                f"serves {info.model} with {_listed(info.shape)}, but {self._model_key} has {_listed(ours)}; start it from "
                f"this recipe ({self._serve})"
            )
        elif info.transfer_backend != self._backend:
            problem = (
                f"takes weights over {info.transfer_backend}, this trainer sends them over {self._backend}; start it "
                f"""with --weight-transfer-config '{{"backend": "{self._backend}"}}' ({self._serve} does)"""
            )
        elif info.logprobs_mode != "processed_logprobs":
            problem = f"returns {info.logprobs_mode}; start it with --logprobs-mode processed_logprobs"
        elif needed is not None and info.max_model_len < needed:
            problem = (
                f"has a context of {info.max_model_len} tokens, this run needs {needed} (rollout.max_model_len); start "
                "it with --max-model-len"
            )
        if problem:
            raise ConfigError(f"{self.key}: {url} {problem}")

    @property
    def _serve(self) -> str:
        return "reheat serve" if self._model_key == "model.hf_path" else "reheat serve with model.hf_path=its folder"


def _listed(shape: Mapping[str, int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in shape.items())
