"""How often a server may be started again before its run, or its `reheat serve`, gives it up."""

from __future__ import annotations

import time
from collections import deque

WINDOW_S = 3600.0


class RestartLimit:
    """At most `limit` restarts within an hour, of one server: a rare death may recur for as long as a run lasts."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._restarts: deque[float] = deque()

    def __str__(self) -> str:
        return f"{self._limit} restarts within an hour (rollout.max_restarts)"

    def take(self) -> int | None:
        """The number of restarts within the last hour with the one that begins now, or None if it is one too many."""
        now = time.monotonic()
        while self._restarts and now - self._restarts[0] > WINDOW_S:
            self._restarts.popleft()
        if len(self._restarts) >= self._limit:
            return None
        self._restarts.append(now)
        return len(self._restarts)
