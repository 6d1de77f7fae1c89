"""What a process under test hears, whoever started the tests: a shell in the background ignores SIGINT, nohup SIGHUP."""

from __future__ import annotations

import signal


def hear_signals() -> None:
    """For `preexec_fn`."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
