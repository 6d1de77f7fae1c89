"""`python -m MODULE` in a session of its own, its output in a log whose end tells why it ended."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Protocol

import megatron_reheat

PACKAGE_ROOT = Path(megatron_reheat.__file__).parent.parent
LOG_TAIL_LINES = 8
LOG_TAIL_BYTES = 16000
# what nanobind says of Triton at the end of every vLLM server, 40 lines that are not the reason
NOISE = re.compile(r"nanobind: | - leaked | - \.\.\. skipped|See https://nanobind")


class Process(Protocol):
    """What is asked of `subprocess.Popen` here."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


class ModuleProcess:
    """Starts at once, output appended to `log_file`; the module may be one of this package, installed or not.

    Without a `log_file` the output is kept in a temporary file, of which the module makes its own log (`log_to`). `fork` makes
    the process in another way, with its output to the file that it gets.
    """

    _process: Process

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str],
        log_file: Path | None,
        pass_fds: Sequence[int] = (),
        fork: Callable[[IO[bytes]], Process] | None = None,
    ) -> None:
        self._log_file, self._log_start = log_file, 0
        self._aside: IO[bytes] | None = None
        fork = fork or partial(_start, module, arguments, env, pass_fds)
        if log_file is None:
            self._aside = tempfile.TemporaryFile()  # noqa: SIM115
            self._process = fork(self._aside)
        else:
            self.log_to(log_file)
            with log_file.open("ab") as log:
                self._process = fork(log)

    def log_to(self, log_file: Path) -> None:
        """Where the module is going to print, and takes what it has printed before; see `engine_process`."""
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("ab") as log:
            self._log_file, self._log_start = log_file, log.tell()

    @property
    def pid(self) -> int:
        """Also that of its session and process group."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """False as soon as it has ended, for whatever reason."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends it alone, not what it has started, and waits for it."""
        self._process.kill()
        self._process.wait()

    def _log_tail(self) -> str:
        if self._log_file is None:
            return ""
        if self._aside is not None:  # what it has not taken to its log
            self._aside.seek(0)
            with self._log_file.open("ab") as log:
                shutil.copyfileobj(self._aside, log)
            self._aside.truncate(0)
        return log_tail(self._log_file, self._log_start)


def _start(
    module: str, arguments: Sequence[str], env: Mapping[str, str], pass_fds: Sequence[int], log: IO[bytes]
) -> Process:
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=with_package(env),
        pass_fds=pass_fds,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C is for the trainer, which then ends this process in order
    )


def with_package(env: Mapping[str, str]) -> dict[str, str]:
    """`env` under which a child imports this package from where this process has it."""
    return {**env, "PYTHONPATH": os.pathsep.join(filter(None, (str(PACKAGE_ROOT), env.get("PYTHONPATH"))))}


def log_tail(log_file: Path, start: int) -> str:
    """The last lines after byte `start`, where this child's output begins, as the end of a message."""
    with log_file.open("rb") as log:
        size = log.seek(0, os.SEEK_END)
        log.seek(max(start, size - LOG_TAIL_BYTES))
        lines = log.read().decode(errors="replace").splitlines()
    last = [line for line in lines if not NOISE.match(line)][-LOG_TAIL_LINES:]
    return f"; last lines of {log_file}:\n" + "\n".join(f"  {line}" for line in last)
