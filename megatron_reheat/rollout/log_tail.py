"""The end of what a child process printed, for the error that tells of its end."""

from __future__ import annotations

import os
import re
from pathlib import Path

LOG_TAIL_LINES = 8
LOG_TAIL_BYTES = 16000
# what nanobind says of Triton at the end of every vLLM server, 40 lines that are not the reason
NOISE = re.compile(r"nanobind: | - leaked | - \.\.\. skipped|See https://nanobind")


def log_tail(log_file: Path, start: int) -> str:
    """The last lines after byte `start`, where this child's output begins, as the end of a message."""
    with log_file.open("rb") as log:
        size = log.seek(0, os.SEEK_END)
        log.seek(max(start, size - LOG_TAIL_BYTES))
        lines = log.read().decode(errors="replace").splitlines()
    last = [line for line in lines if not NOISE.match(line)][-LOG_TAIL_LINES:]
    return f"; last lines of {log_file}:\n" + "\n".join(f"  {line}" for line in last)
