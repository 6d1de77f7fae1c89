"""Somebody else's program, a chat template, tried in a process of its own that may take a second and a gigabyte."""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable

CPU_S = 1
WAIT_S = 60.0  # on a machine so busy that a second of its own takes longer than that
EXTRA_BYTES = 2**30
_DONE, _FAILED = b"0", b"1"


class OverLimit(Exception):
    """It would not have come to an end, or taken all memory there is."""


class Failed(Exception):
    """What it raised, in one line."""


def run_apart(make_text: Callable[[], str]) -> str:
    """What `make_text` returns, computed in a fork of this process. Nothing that a loop in Python or in C does can hold it up.

    Raises:
        OverLimit: it took more than CPU_S seconds or EXTRA_BYTES of memory.
        Failed: it raised something else.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _answer(make_text, writing)
    os.close(writing)
    try:
        answer = _read_all(reading)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)  # also one that is still at it
        os.waitpid(child, 0)
    if not answer:
        raise OverLimit(f"it does not end within {CPU_S} s")
    text = answer[1:].decode("utf-8", "surrogatepass")
    if answer[:1] == _DONE:
        return text
    if text == MemoryError.__name__:
        raise OverLimit(f"it needs more than {EXTRA_BYTES >> 30} GiB of memory")
    raise Failed(text)


def _answer(make_text: Callable[[], str], writing: int) -> None:
    """Does not return."""
    try:
        with open("/proc/self/statm") as statm:
            size = int(statm.read().split()[0]) * resource.getpagesize()
        # no core of what exceeds them; and the signal must end this process, whatever its parent does with it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (size + EXTRA_BYTES, size + EXTRA_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 1))
        answer = _DONE + make_text().encode("utf-8", "surrogatepass")
    except MemoryError:
        answer = _FAILED + MemoryError.__name__.encode()
    except BaseException as error:  # a template is a program: it raises its own errors, and any of Python's
        reason = " ".join(str(error).split()) or type(error).__name__
        answer = _FAILED + reason.encode("utf-8", "backslashreplace")
    try:
        while answer:
            answer = answer[os.write(writing, answer) :]
    finally:
        os._exit(0)


def _read_all(reading: int) -> bytes:
    """Until the writer has ended; empty where that takes too long."""
    deadline = time.monotonic() + WAIT_S
    parts: list[bytes] = []
    while select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(reading, 1 << 20)
        if not part:
            return b"".join(parts)
        parts.append(part)
    return b""
