"""HTTP to vLLM servers: the routes a rollout needs, and what their failures mean."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp

from megatron_reheat.errors import EngineDied, ReheatError
from megatron_reheat.rollout.server.process import SHAPE_KEY

T = TypeVar("T")


@dataclass(frozen=True)
class ServerInfo:
    """What a server says of itself.

    `shape` is the policy it was started for (`policy_shape`), None if it was not started by `reheat`; `num_workers` are the
    members it adds to a weight-transfer group.
    """

    version: str
    model: str
    max_model_len: int
    shape: dict[str, int] | None
    logprobs_mode: str
    transfer_backend: str | None
    num_workers: int


class ServerClient:
    """One server. Every coroutine belongs to the loop of the `Network` that made the client.

    Raises, from every request:
        EngineDied: the server is gone, failed inside or did not answer within `timeout_s`.
        ReheatError: it refused the request.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self._timeout_s = timeout_s

    async def describe(self) -> ServerInfo:
        version, models, world, info = await asyncio.gather(
            self.request("GET", "version"),
            self.request("GET", "v1/models"),
            self.request("GET", "get_world_size"),
            self.request("GET", "server_info?config_format=json"),
        )
        vllm = info["vllm_config"]
        model, card = vllm["model_config"], models["data"][0]
        return ServerInfo(
            version=version["version"],
            model=card.get("root") or model["model"],
            max_model_len=card["max_model_len"],
            shape=(vllm.get("additional_config") or {}).get(SHAPE_KEY),
            logprobs_mode=model["logprobs_mode"],
            transfer_backend=(vllm.get("weight_transfer_config") or {}).get("backend"),
            num_workers=world["world_size"],
        )

    async def is_ready(self) -> bool:
        try:
            async with self._session.get(f"{self.url}/health", timeout=aiohttp.ClientTimeout(5)) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def post(self, route: str, body: Any = None) -> Any:
        return await self.request("POST", route, body)

    async def request(self, method: str, route: str, body: Any = None) -> Any:
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        try:
            async with self._session.request(method, f"{self.url}/{route}", json=body, timeout=timeout) as response:
                text = await response.text()
        except TimeoutError:
            raise EngineDied(
                f"vLLM server {self.url} did not answer /{route} within {self._timeout_s:g} s (rollout.timeout_s)"
            ) from None
        except aiohttp.ClientError as error:
            raise EngineDied(f"vLLM server {self.url} is gone: {type(error).__name__} at /{route}") from None
        if response.status < 400:
            return json.loads(text) if text else None
        message = f"vLLM server {self.url} answered {response.status} to /{route}: {_message(text)}"
        raise (EngineDied if response.status >= 500 else ReheatError)(message)


class Network:
    """An event loop in a thread of its own, with one connection pool for all servers."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-servers", daemon=True)
        self._thread.start()
        self._session = self.run(_open_session())

    def client(self, url: str, timeout_s: float) -> ServerClient:
        return ServerClient(url, self._session, timeout_s)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Runs `work` beside the caller; `result()` of what is returned waits for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        if self._loop.is_running():
            self.run(self._give_up())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    async def _give_up(self) -> None:
        """Ends what is still under way, or a thread that waits for it would wait for ever."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._session.close()


async def _open_session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


def _message(text: str) -> str:
    """The sentence inside vLLM's error bodies, which come in three shapes."""
    try:
        body = json.loads(text)
    except ValueError:
        return text[:500]
    if isinstance(body, dict):
        inner = body.get("error", body.get("detail", body.get("message")))
        body = inner.get("message", inner) if isinstance(inner, dict) else inner
    return str(body)[:500]
