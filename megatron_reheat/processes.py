"""No process of a run outlives the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int, who: str, with_signal: signal.Signals = signal.SIGKILL) -> None:
    """Has the kernel send this process a signal when its parent ends, however it ends.

    `parent_pid` is the parent as the parent saw itself; if it is gone already, this process exits at once.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, with_signal)
    if os.getppid() != parent_pid:
        sys.exit(f"the {who} ended before this process could start")
