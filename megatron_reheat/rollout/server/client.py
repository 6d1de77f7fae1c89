"""HTTP to vLLM servers: the routes a rollout needs, and what their failures mean."""

from __future__ import annotations

import asyncio
import json
import resource
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp

from megatron_reheat.confidential import TOKEN_VARIABLE
from megatron_reheat.errors import ConfigError, EngineDied, EngineStuck, ReheatError
from megatron_reheat.rollout.server.guard import END_ROUTE
from megatron_reheat.rollout.server.process import SHAPE_KEY

T = TypeVar("T")

AUTHORIZATION = "Authorization"
NOT_ALLOWED = (401, 403)
STRANGER_WAIT_S = 1.5
ANSWER_WAIT_S = 5.0
OPEN_FILES = 1 << 16  # a connection is one; what is usual would not do for the requests of a large step


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
        EngineDied: the server is gone or failed inside.
        EngineStuck: it did not answer within `timeout_s`.
        ReheatError: it refused the request.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self._has_token = AUTHORIZATION in session.headers
        self._timeout_s = timeout_s

    async def describe(self) -> ServerInfo:
        """What it says of itself, by four routes that are asked at once.

        Raises:
            ConfigError: it does not say what vLLM's servers say.
        """
        version, models, world, info = await asyncio.gather(
            self.request("GET", "version"),
            self.request("GET", "v1/models"),
            self.request("GET", "get_world_size"),
            self.request("GET", "server_info?config_format=json"),
        )
        try:
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
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise self._stranger(f"what it says of itself lacks {error}") from None

    async def is_ready(self) -> bool:
        """Whether /health is answered with 200, within ANSWER_WAIT_S."""
        return await self._is_ok("GET", "health")

    async def answers(self) -> bool:
        """Whether the engine does. /health is answered without it, also where it hangs."""
        return await self._is_ok("GET", "weight_info")

    async def weights_label(self) -> str:
        """The label of the weights that the engine holds; vLLM's own where it was sent none."""
        return (await self.request("GET", "weight_info"))["weight_version"]

    async def ask_to_end(self) -> None:
        """Has a server of `reheat` end at once; whoever keeps it starts it again. Nothing happens where it cannot be asked."""
        await self._is_ok("POST", END_ROUTE.removeprefix("/"))

    async def _is_ok(self, method: str, route: str) -> bool:
        timeout = aiohttp.ClientTimeout(ANSWER_WAIT_S)
        try:
            async with self._session.request(
                method, f"{self.url}/{route}", timeout=timeout, allow_redirects=False
            ) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def refuse_stranger(self) -> None:
        """Nothing where no server listens yet, or one is too busy to answer.

        Raises:
            ConfigError: what listens there is no vLLM server, or one that asks for another token.
        """
        timeout = aiohttp.ClientTimeout(STRANGER_WAIT_S)
        try:
            async with self._session.get(f"{self.url}/health", timeout=timeout, allow_redirects=False) as response:
                status = response.status
            if status < 300:
                await self._version(timeout)
                return
        except aiohttp.ClientResponseError as error:  # an answer, but not in HTTP
            raise self._stranger(f"its answer is not HTTP ({error.message.splitlines()[0][:60]})") from None
        except (aiohttp.ClientError, TimeoutError):
            return
        if status < 500:
            raise self._stranger(f"it answered {status} to /health")

    async def _version(self, timeout: aiohttp.ClientTimeout) -> None:
        async with self._session.get(f"{self.url}/version", timeout=timeout, allow_redirects=False) as response:
            text = await response.text(errors="replace")
        if response.status in NOT_ALLOWED:
            raise self._not_allowed()
        try:
            known = isinstance(json.loads(text)["version"], str)
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise self._stranger("its /version tells none")

    def _stranger(self, why: str) -> ConfigError:
        return ConfigError(
            f"rollout.servers: {self.url} is no vLLM server: {why}; start one there (reheat serve), or correct the address"
        )

    def _not_allowed(self) -> ConfigError:
        state = "is not the server's" if self._has_token else "is not set here"
        return ConfigError(
            f"rollout.servers: {self.url} asks for a token, and {TOKEN_VARIABLE} {state}; set it to what `reheat serve` was "
            "started with"
        )

    async def post(self, route: str, body: Any = None) -> Any:
        """See `request`."""
        return await self.request("POST", route, body)

    async def request(self, method: str, route: str, body: Any = None) -> Any:
        """What the answer holds as JSON, None where it is empty; `body` goes as JSON, too, and none where it is None.

        Raises:
            ConfigError: the server asks for another token, or its answer is not JSON.
        """
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        try:
            async with self._session.request(
                method, f"{self.url}/{route}", json=body, timeout=timeout, allow_redirects=False
            ) as response:
                text = await response.text(errors="replace")
        except TimeoutError:
            raise EngineStuck(
                f"vLLM server {self.url} did not answer /{route} within {self._timeout_s:g} s (rollout.timeout_s)"
            ) from None
        except aiohttp.ClientError as error:
            raise EngineDied(f"vLLM server {self.url} is gone: {type(error).__name__} at /{route}: {error}") from None
        if response.status in NOT_ALLOWED:
            raise self._not_allowed()
        if response.status < 300:
            try:
                return json.loads(text) if text else None
            except ValueError:
                raise self._stranger(f"its answer to /{route} is not JSON") from None
        message = f"vLLM server {self.url} answered {response.status} to /{route}: {_message(text)}"
        raise (EngineDied if response.status >= 500 else ReheatError)(message)


class Network:
    """An event loop in a thread of its own, with one session for all servers, which ask for `token`.

    `most_requests` is how many may be under way at a time: half of the files that this process may open.
    """

    def __init__(self, token: str | None) -> None:
        self.most_requests = _allowed_files() // 2
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-servers", daemon=True)
        self._thread.start()
        self._session = self.run(_open_session(token))

    def client(self, url: str, timeout_s: float) -> ServerClient:
        """`timeout_s` is for each request as a whole."""
        return ServerClient(url, self._session, timeout_s)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Waits for `work` and returns its result; not to be called on the loop's own thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Runs `work` beside the caller; `result()` of what is returned waits for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Cancels what is under way and ends the thread; safe to call twice."""
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


def _allowed_files() -> int:
    """Raised as far as this process may raise it itself, up to OPEN_FILES."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
        soft = enough
    return OPEN_FILES if soft == resource.RLIM_INFINITY else soft


async def _open_session(token: str | None) -> aiohttp.ClientSession:
    headers = {} if token is None else {AUTHORIZATION: f"Bearer {token}"}
    # a connection for each request: one that was kept may be closed by the server (after 5 idle seconds) as it is used again,
    # which looks as if the server had died
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True), headers=headers)


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
