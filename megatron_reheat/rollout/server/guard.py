"""What stands before every route of a vLLM server: a way to end it, and the token that all of them ask for.

vLLM's own key guards the routes below /v1 alone: those that replace weights, pause, put to sleep or save are open to anybody.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from megatron_reheat.confidential import TOKEN_VARIABLE
from megatron_reheat.errors import ConfigError

MIN_TOKEN_LENGTH = 16
OPEN_ROUTES = ("/health",)  # says nothing but that the server is up
END_ROUTE = "/reheat/end"
END_STATUS = 75  # of a server that its trainer had end

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


def server_token() -> str | None:
    """What vLLM servers ask of whoever talks to them, None where they ask for nothing.

    Raises:
        ConfigError: it is too short to be one, or cannot stand in a header.
    """
    token = os.environ.get(TOKEN_VARIABLE) or None
    if token is not None and (len(token) < MIN_TOKEN_LENGTH or not re.fullmatch(r"[!-~]+", token)):
        raise ConfigError(
            f"{TOKEN_VARIABLE} must be {MIN_TOKEN_LENGTH} or more letters, digits and signs without spaces; make one with "
            "`openssl rand -hex 24`"
        )
    return token


def own_token() -> str:
    """What the servers of a run ask for: the environment's token, or one that only this run knows.

    Others on the machine can reach them too, though they listen on 127.0.0.1 alone.
    """
    return server_token() or secrets.token_hex(24)


class EndRoute:
    """ASGI middleware, which vLLM is given by name: a POST to `END_ROUTE` ends the server at once.

    For a trainer that finds its engine stuck, or left with half of its weights: whoever keeps the server starts it again.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (scope["method"], scope["path"]) == ("POST", END_ROUTE):
            print("ended because its trainer asked for it", flush=True)
            os._exit(END_STATUS)  # what it started is ended by its guardian
        await self._app(scope, receive, send)


class TokenGuard:
    """`EndRoute` behind a token: answers 401 to every request without that of the environment."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        token = server_token()
        if token is None:
            raise RuntimeError(f"the server was to be guarded by {TOKEN_VARIABLE}, which is not set")
        self._app = EndRoute(app)
        self._expected = _digest(f"Bearer {token}".encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # whatever else there may be than the server's own start and end is for the token's owner
        if scope["type"] == "lifespan" or scope["path"] in OPEN_ROUTES or self._is_allowed(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "a token is needed"}'})

    def _is_allowed(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(_digest(given[0]), self._expected)


def _digest(text: bytes) -> bytes:
    """Of equal length whatever was sent, so that the time of a comparison tells nothing."""
    return hashlib.sha256(text).digest()
