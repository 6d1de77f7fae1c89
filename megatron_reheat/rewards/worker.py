"""A reward worker: `python -m megatron_reheat.rewards.worker FD KIND TIMEOUT_S [FUNCTIONS]`, started by `VerifierPool`.

Three processes, each the child of the one before: this one, which only keeps the others; a supervisor, which speaks
with the pool and holds the clock; a grader, the only one that sees answers, which the supervisor replaces whenever
something is wrong. The supervisor and the graders live in namespaces of their own where the kernel allows it.

None outlives the pool's process: each ends with its parent by the kernel's signal, the supervisor also when the pool's
end of the connection or this process's end of a pipe is closed.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from megatron_reheat.errors import ConfigError
from megatron_reheat.processes import await_signals, die_with_parent
from megatron_reheat.rewards.protocol import (
    CHUNK,
    CORRECT,
    ERROR,
    INCORRECT,
    MAX_REPLIES_BYTES,
    READY,
    REPLY,
    USELESS,
)
from megatron_reheat.rewards.sandbox import (
    MEMORY_BYTES,
    SystemCallFilter,
    adopt_orphans,
    end_descendants,
    enter_namespaces,
)

if TYPE_CHECKING:
    from megatron_reheat.rewards.graders import Grader
    from megatron_reheat.rewards.supervisor import Supervisor

Trial = tuple[str, Mapping[str, Any], int]

_HELD = {signal.SIGTERM, signal.SIGCHLD}

# Answers of known verdicts: each grader is tried on them in its sandbox before any other. Of a user's functions it is
# known only that they cannot grade what has no record; the run tries them on its first records.
_COUNTDOWN = {"task": "countdown", "entry": {"metadata": {"numbers": [11, 4, 7], "target": 22}}}
TRIALS: dict[str, list[Trial]] = {
    "math": [
        (r"\boxed{\frac{1}{2}+x^2}", {"answer": "x^2+0.5"}, CORRECT),
        (r"\boxed{\sqrt{3}}", {"answer": "2"}, INCORRECT),
    ],
    "reasoning_gym": [("7+4+11", _COUNTDOWN, CORRECT), ("7*4+11", _COUNTDOWN, INCORRECT)],
    "function": [("", {}, ERROR)],
}


def main(fd: int, kind: str, timeout_s: float, functions: str = "{}") -> None:
    """`functions` is JSON, of kind function: `weights`, `correct_at`, and whether they stay in the `sandbox`."""
    own = json.loads(functions)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal group; the pool decides
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    parent = os.getppid()
    adopt_orphans()
    namespaces = enter_namespaces() if own.get("sandbox", True) else ""
    die_with_parent(parent, "trainer", signal.SIGTERM)  # only now: new namespaces would undo it
    lifeline, ours = os.pipe()
    supervisor = os.fork()
    if supervisor == 0:
        os.close(ours)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})  # what ends this process is no SIGTERM
        _supervise(Connection(fd), lifeline, kind, timeout_s, namespaces, own)
    else:
        os.close(lifeline)
        os.close(fd)
        sys.exit(_keep(parent, supervisor))


def _keep(parent: int, supervisor: int) -> int:
    """Waits until the supervisor ends or the pool asks this process to end, then ends all that is left; the exit status."""
    await_signals(parent, {signal.SIGCHLD})
    return max(0, end_descendants().get(supervisor, 0))


def _supervise(
    pool: Connection, lifeline: int, kind: str, timeout_s: float, namespaces: str, own: Mapping[str, Any]
) -> None:
    die_with_parent(os.getppid(), "reward worker's keeper")  # 0 if that is outside this namespace
    # Loaded here and not above: the keeper stays small.
    from megatron_reheat.rewards.supervisor import Supervisor

    try:
        grader = _make_grader(kind, own)
    except ConfigError as error:
        pool.send_bytes((USELESS + str(error).encode(errors="replace"))[:MAX_REPLIES_BYTES])
        sys.exit(str(error))
    trials, confined = TRIALS[kind], own.get("sandbox", True)
    for response, verifier, verdict in trials:  # fills the parsers' caches before any grader is forked
        if verdict != ERROR:
            grader(response, verifier)
    supervisor = Supervisor(pool, lifeline, grader, timeout_s, in_namespace=bool(namespaces), confined=confined)
    system_calls = _with_filter(supervisor, trials) if confined else ""
    if not system_calls and not _passes(supervisor, trials):
        sys.exit(f"{kind} graders do not work in their sandbox")
    defences = _defences(kind, namespaces, system_calls) if confined else "no sandbox (reward.sandbox=false)"
    pool.send_bytes(READY + defences.encode())
    supervisor.serve()


def _make_grader(kind: str, own: Mapping[str, Any]) -> Grader:
    """
    Raises:
        ConfigError: a reward function of the user's cannot be imported.
    """
    if kind == "function":
        from megatron_reheat.rewards.functions import FunctionGrader

        return FunctionGrader(own["weights"], own["correct_at"])
    from megatron_reheat.rewards.graders import grader_of

    return grader_of(kind)


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
    """Whether a grader in its sandbox gives the verdicts that it should."""
    items = [(response, pickle.dumps(verifier)) for response, verifier, _ in trials]
    replies = b"".join(supervisor.grade(CHUNK.pack(0, len(items)) + pickle.dumps(items)))
    return [verdict for _, verdict, *_ in REPLY.iter_unpack(replies)] == [verdict for *_, verdict in trials]


def _defences(kind: str, namespaces: str, system_calls: str) -> str:
    active = [
        *([] if kind == "function" else ["grammars (no answer is evaluated)"]),
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
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), *sys.argv[4:])
