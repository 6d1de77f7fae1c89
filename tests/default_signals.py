"""What a process under test hears, whoever started the tests: a shell in the background ignores SIGINT and SIGQUIT,
nohup SIGHUP."""

from __future__ import annotations

import signal


def hear_signals() -> None:
    """For `preexec_fn`."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
