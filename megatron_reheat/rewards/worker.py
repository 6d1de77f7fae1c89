"""The grading process: `python -m megatron_reheat.rewards.worker FD KIND TIMEOUT_S`, started by `VerifierPool`.

Nothing in this package evaluates model text, but sympy does, inside math-verify and reasoning-gym. That happens here
only: in a process without the trainer's memory or environment variables, with limited memory, that refuses to write
files, start processes or open sockets, and that is killed when an answer takes too long. This stops accidents and
reward hacking by ordinary code; it is not a sandbox against a determined attacker.

It ends by itself when its parent is gone: the pipe closes, or, while a grader is stuck, the kernel's alarm fires.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from megatron_reheat.rewards.graders import GRADERS, Grader
from megatron_reheat.rewards.protocol import CORRECT, ERROR, INCORRECT, MAX_REPLY_BYTES, READY

MEMORY_BYTES = 4 * 2**30
PARENT_CHECK_S = 5.0
ALARM_GRACE_S = 5.0

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_REFUSED = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.")
_NEEDED_BY_IMPORTS = ("os.listdir", "os.scandir")


def main(fd: int, kind: str, timeout_s: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal group; the parent decides
    parent = os.getppid()
    connection = Connection(fd)
    _restrict()
    connection.send_bytes(READY)
    # The pipe alone is not enough: a process the parent forked meanwhile may hold a copy of its end.
    while os.getppid() == parent:
        try:
            if connection.poll(PARENT_CHECK_S):
                _grade_chunk(connection, GRADERS[kind], timeout_s)
        except (EOFError, OSError):
            return


def _grade_chunk(connection: Connection, grader: Grader, timeout_s: float) -> None:
    """Answers each item of one message as soon as it is graded, in order, so that the parent can time every item."""
    for text, verifier in connection.recv():
        signal.setitimer(signal.ITIMER_REAL, timeout_s + ALARM_GRACE_S)
        try:
            reply = CORRECT if grader(text, verifier) >= 1.0 else INCORRECT
        except Exception as error:  # graders and sympy raise anything on odd text; the parent counts these
            reply = ERROR + f"{type(error).__name__}: {error}".encode(errors="replace")[: MAX_REPLY_BYTES - 1]
        connection.send_bytes(reply)
    signal.setitimer(signal.ITIMER_REAL, 0)


def _restrict() -> None:
    """For good: neither the limits nor the hook can be lifted again."""
    limits = {resource.RLIMIT_AS: MEMORY_BYTES, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    for kind, limit in limits.items():
        _, hard = resource.getrlimit(kind)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))
    # Parsers print their complaints about every odd answer.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stderr.fileno())
    sys.addaudithook(_refuse_side_effects)


def _refuse_side_effects(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        refused = bool(arguments[2] & _WRITING)
    else:
        refused = event.startswith(_REFUSED) and event not in _NEEDED_BY_IMPORTS
    if refused:
        raise PermissionError(f"a grader may not use {event}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
