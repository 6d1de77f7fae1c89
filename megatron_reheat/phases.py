"""What a run does before its first step, a line for each part of it: a terminal that says nothing for half a minute looks
stuck."""

from __future__ import annotations

import time

_started = time.monotonic()
_is_heard = False


def let_announce(is_heard: bool) -> None:
    """Whether this process tells: one of a run's, and none where the console is off."""
    global _is_heard
    _is_heard = is_heard


def announce(what: str) -> None:
    """`what` begins now. The seconds are those since this process began."""
    if _is_heard:
        print(f"--- {time.monotonic() - _started:.0f} s: {what}", flush=True)
