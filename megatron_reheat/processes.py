"""No process of a run outlives the one that started it, and none but that one ends it in order."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterable

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
# what makes a process a rank of the trainer's job
_TORCHRUN_VARIABLES = frozenset(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
# of the trainer alone (`parallel.kernel_order`)
_TRAINER_VARIABLES = ("CUDA_DEVICE_MAX_CONNECTIONS",)
_TORCHRUN_PREFIXES = ("GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "PET_")


def helper_environment() -> dict[str, str]:
    """This process's environment for one that is no rank of its job, and must not join it."""
    return {
        key: value
        for key, value in os.environ.items()
        if key not in (*_TORCHRUN_VARIABLES, *_TRAINER_VARIABLES) and not key.startswith(_TORCHRUN_PREFIXES)
    }


def die_with_parent(parent_pid: int, who: str, with_signal: signal.Signals = signal.SIGKILL) -> None:
    """Has the kernel send this process a signal when its parent ends, however it ends.

    `parent_pid` is the parent as the parent saw itself; if it is gone already, this process exits at once.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, with_signal)
    if os.getppid() != parent_pid:
        sys.exit(f"the {who} ended before this process could start")


def name_process(name: str) -> None:
    """As `ps` and `top` show it beside the command line: at most 15 bytes."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode())


def await_signals(parent_pid: int, others: Iterable[signal.Signals] = (), timeout_s: float | None = None) -> int | None:
    """For a helper that blocks SIGTERM: waits until its parent asks it to end, or has ended, or one of `others` comes.

    A scheduler that signals every process of a job means the run, which still needs its helpers for the step in progress. The
    kernel's signal at the parent's death (`die_with_parent`) counts as the parent's.

    Returns:
        The signal's number, or None after `timeout_s`.
    """
    awaited = {signal.SIGTERM, *others}
    until = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        if until is None:
            got = signal.sigwaitinfo(awaited)
        else:
            timely = signal.sigtimedwait(awaited, max(0.0, until - time.monotonic()))
            if timely is None:
                return None
            got = timely
        if got.si_signo != signal.SIGTERM or got.si_pid == parent_pid or os.getppid() != parent_pid:
            return got.si_signo
