"""`reheat` in a fork of this process, which has imported everything already: what it says, how it ends, and when it hangs."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

ACCEPTED = 99  # exit status of a command that raised `Accepted`
LIMIT_S = 20.0  # then it hangs; of the clock, as what waits for ever takes none of the processor
MEMORY = 10 << 30
NOBODY = 65534


class Accepted(BaseException):
    """Raised where a command would go on to what nothing here is started for: its input was accepted."""


@dataclass(frozen=True)
class Ended:
    """`status` is None for a command that did not come to an end; `seconds` are the processor's."""

    status: int | None
    output: str
    errors: str
    seconds: float

    @property
    def sentence(self) -> str:
        return self.errors.removeprefix("error: ").rstrip("\n")

    @property
    def is_one_sentence(self) -> bool:
        one_line = self.errors.startswith("error: ") and "\n" not in self.sentence
        return self.status == 1 and one_line and "Traceback" not in self.errors


def reheat(
    argv: Sequence[str], folder: Path, accepting: Callable[[], AbstractContextManager[object]], user: int | None = None
) -> Ended:
    """Inside `accepting()`, with `folder` as its own, and as `user`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        unread, never = os.pipe()  # a standard input that stays open and says nothing
        pid = os.fork()
        if pid == 0:
            _be_reheat(argv, folder, accepting, (unread, output.fileno(), errors.fileno()), user)
        status = _wait(pid)
        os.close(unread), os.close(never)
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read(1 << 20).decode(errors="replace"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Ended(status, texts[0], texts[1], seconds)


def _be_reheat(
    argv: Sequence[str],
    folder: Path,
    accepting: Callable[[], AbstractContextManager[object]],
    streams: tuple[int, int, int],
    user: int | None,
) -> None:
    """Does not return."""
    status = 70
    try:
        for target, source in enumerate(streams):
            os.dup2(source, target)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.setsid()
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.environ["CANARY"] = str(folder / "executed")
        if user is not None:
            os.setresgid(user, user, user), os.setgroups([]), os.setresuid(user, user, user)
        from megatron_reheat import cli

        with accepting():
            status = cli.main(argv)
    except Accepted:
        status = ACCEPTED
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def _wait(pid: int) -> int | None:
    deadline = time.perf_counter() + LIMIT_S
    while time.perf_counter() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None
