"""A port for a process that will listen only seconds from now."""

from __future__ import annotations

import contextlib
import random
import socket

# below the range from which the system takes ports for outgoing connections
_RANGE = range(20000, 32768)


def free_port() -> int:
    """A TCP port that nothing listens on now, from a range that nothing is likely to take meanwhile."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", random.SystemRandom().choice(_RANGE)))
            return probe.getsockname()[1]
