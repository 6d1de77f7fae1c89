"""A reward worker: `python -m megatron_reheat.rewards.worker FD KIND TIMEOUT_S`, started by `VerifierPool`.

Three processes, each the child of the one before: this one, which only keeps the others; a supervisor, which speaks
with the pool and holds the clock; a grader, the only one that sees answers, which the supervisor replaces whenever
something is wrong. The supervisor and the graders live in namespaces of their own where the kernel allows it.

None outlives the pool's process: each ends with its parent by the kernel's signal, the supervisor also when the pool's
end of the connection or this process's end of a pipe is closed.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from megatron_reheat.processes import await_signals, die_with_parent
from megatron_reheat.rewards.protocol import CHUNK, CORRECT, INCORRECT, READY, REPLY
from megatron_reheat.rewards.sandbox import (
    MEMORY_BYTES,
    SystemCallFilter,
    adopt_orphans,
    end_descendants,
    enter_namespaces,
)

if TYPE_CHECKING:
    from megatron_reheat.rewards.supervisor import Supervisor

Trial = tuple[str, Mapping[str, Any], bool]

_HELD = {signal.SIGTERM, signal.SIGCHLD}

# Answers of known worth: each grader is tried on them in its sandbox before any other.
_COUNTDOWN = {"task": "countdown", "entry": {"metadata": {"numbers": [11, 4, 7], "target": 22}}}
TRIALS: dict[str, list[Trial]] = {
    "math": [(r"\boxed{\frac{1}{2}+x^2}", {"answer": "x^2+0.5"}, True), (r"\boxed{\sqrt{3}}", {"answer": "2"}, False)],
    "reasoning_gym": [("7+4+11", _COUNTDOWN, True), ("7*4+11", _COUNTDOWN, False)],
}


def main(fd: int, kind: str, timeout_s: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal group; the pool decides
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    parent = os.getppid()
    adopt_orphans()
    namespaces = enter_namespaces()
    die_with_parent(parent, "trainer", signal.SIGTERM)  # only now: new namespaces would undo it
    lifeline, ours = os.pipe()
    supervisor = os.fork()
    if supervisor == 0:
        os.close(ours)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})  # what ends this process is no SIGTERM
        _supervise(Connection(fd), lifeline, kind, timeout_s, namespaces)
    else:
        os.close(lifeline)
        os.close(fd)
        sys.exit(_keep(parent, supervisor))


def _keep(parent: int, supervisor: int) -> int:
    """Waits until the supervisor ends or the pool asks this process to end, then ends all that is left; the exit status."""
    await_signals(parent, {signal.SIGCHLD})
    return max(0, end_descendants().get(supervisor, 0))


def _supervise(pool: Connection, lifeline: int, kind: str, timeout_s: float, namespaces: str) -> None:
    die_with_parent(os.getppid(), "reward worker's keeper")  # 0 if that is outside this namespace
    # Loaded here and not above: the keeper stays small.
    from megatron_reheat.rewards.graders import GRADERS
    from megatron_reheat.rewards.supervisor import Supervisor

    grader, trials = GRADERS[kind], TRIALS[kind]
    for response, verifier, _ in trials:  # fills the parsers' caches before any grader is forked
        grader(response, verifier)
    supervisor = Supervisor(pool, lifeline, grader, timeout_s, in_namespace=bool(namespaces))
    system_calls = _with_filter(supervisor, trials)
    if not system_calls and not _passes(supervisor, trials):
        sys.exit(f"{kind} graders do not work in their sandbox")
    pool.send_bytes(READY + _defences(namespaces, system_calls).encode())
    supervisor.serve()


def _with_filter(supervisor: Supervisor, trials: list[Trial]) -> str:
    """Gives the supervisor a filter of system calls and returns its name, or leaves it without and returns nothing."""
    try:
        supervisor.system_calls = SystemCallFilter()
    except OSError:
        return ""
    if _passes(supervisor, trials):
        return supervisor.system_calls.name
    supervisor.system_calls = None
    return ""


def _passes(supervisor: Supervisor, trials: list[Trial]) -> bool:
    """Whether a grader in its sandbox gives the right verdicts on answers of known worth."""
    items = [(response, pickle.dumps(verifier)) for response, verifier, _ in trials]
    replies = b"".join(supervisor.grade(CHUNK.pack(0, len(items)) + pickle.dumps(items)))
    right = [CORRECT if worth else INCORRECT for _, _, worth in trials]
    return [verdict for _, verdict, _ in REPLY.iter_unpack(replies)] == right


def _defences(namespaces: str, system_calls: str) -> str:
    active = [
        "grammars (no answer is evaluated)",
        f"limits ({MEMORY_BYTES >> 20} MiB, no files, no processes)",
        namespaces,
        system_calls,
        "audit hook",
    ]
    missing = [
        *([] if namespaces else ["namespaces (the kernel refuses them)"]),
        *([] if system_calls else ["system call filter (no libseccomp.so.2 that works here)"]),
    ]
    return ", ".join(filter(None, active)) + (f"; missing: {', '.join(missing)}" if missing else "")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
