"""One run at a time in a run folder, on one machine or on several that share a file system.

The lock is a file in the folder. It tells who holds it, and whoever does touches it every few seconds. It is void when its
process is gone, which only the same machine can see, or when it has not been touched for a minute by the file server's clock,
which is the only one that all machines agree on. Nothing here relies on `flock`, which network file systems may ignore.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_reheat.errors import ConfigError, writing

NAME = "run.lock"
TOUCH_EVERY_S = 5.0
VOID_AFTER_S = 60.0
UNREADABLE_S = 2.0  # for so long a lock may be about to be written
POLL_S = 0.5


@dataclass(frozen=True)
class Holder:
    """A process: `place` is where its id means something, `started` tells it from later ones of the same id."""

    host: str
    place: str
    pid: int
    started: str
    token: str

    @classmethod
    def myself(cls) -> Holder:
        """This process, with a token of its own each time."""
        return cls(socket.gethostname(), _place(), os.getpid(), str(_started(os.getpid())), uuid.uuid4().hex)

    def is_here(self) -> bool:
        """Whether it would be seen from here if it were alive: by host name alone, two containers are the same."""
        return self.place == _place()

    def is_gone(self) -> bool:
        """Whether its process has ended; False where that cannot be seen from here."""
        return self.is_here() and _started(self.pid) != self.started


def _place() -> str:
    """This boot of this machine, and the process ids of this container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> str | None:
    """When a process started, in clock ticks since the boot, which no change of the clock moves; None if there is none.

    One that has ended counts as none, even while its parent has not noticed: in a container, nobody may ever.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else rest[18]
    except (OSError, ValueError, IndexError):
        return None


class RunLock:
    """Held within its context.

    Raises:
        ConfigError: another run holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._mine = Holder.myself()
        self._released = threading.Event()
        self._made: list[Path] = []

    def __enter__(self) -> RunLock:
        folder = self._path.parent
        with writing(self._path):
            self._made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            self._take()
        threading.Thread(target=self._touch, daemon=True, name="run-lock").start()
        return self

    def _take(self) -> None:
        first: float | None = None
        while not self._create():
            if _is_foreign(self._path):
                raise ConfigError(f"{self._path} is not a file, so no run's lock; move it away")
            holder, touched, age = _read(self._path), *self._touched()
            is_void = age > VOID_AFTER_S or (age > UNREADABLE_S if holder is None else holder.is_gone())
            if is_void:
                self._take_away(holder)
                continue
            if holder is not None and (holder.is_here() or touched != (first or touched)):
                raise ConfigError(self._refusal(holder))
            if first is None and holder is not None:
                # on another machine it may have ended a moment ago, as a job that is queued again has
                print(f"waiting to see whether {holder.host} still uses {self._path.parent}", flush=True)
            first = first or touched
            time.sleep(POLL_S)

    def __exit__(self, *_: object) -> None:
        self._released.set()
        if _read(self._path) == self._mine:
            self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a run that came to nothing leaves nothing
            for folder in self._made:
                folder.rmdir()

    def _create(self) -> bool:
        """Whether the file is ours now; it appears with its content, or not at all."""
        draft = self._path.with_name(f".{NAME}.{self._mine.token}")
        draft.write_text(json.dumps(asdict(self._mine)))
        try:
            os.link(draft, self._path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links: readers wait a moment for the content
            try:
                with self._path.open("x") as lock:
                    lock.write(draft.read_text())
            except FileExistsError:
                return False
        finally:
            draft.unlink()
        return True

    def _take_away(self, judged: Holder | None) -> None:
        """Removes a void lock, unless somebody else has done so and put up another since it was judged."""
        aside = self._path.with_name(f".{NAME}.void.{self._mine.token}")
        with contextlib.suppress(FileNotFoundError):
            self._path.rename(aside)
            if _read(aside) != judged:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self._path)
            aside.unlink()

    def _touched(self) -> tuple[float, float]:
        """When the lock was touched, and how many seconds ago that is, by the file server's clock."""
        probe = self._path.with_name(f".{NAME}.{self._mine.token}.now")
        probe.touch()
        try:
            now, touched = probe.stat().st_mtime, self._path.stat().st_mtime
        except FileNotFoundError:  # released meanwhile
            return 0.0, 0.0
        finally:
            probe.unlink()
        return touched, now - touched

    def _touch(self) -> None:
        while not self._released.wait(TOUCH_EVERY_S):
            with contextlib.suppress(OSError):
                if _read(self._path) == self._mine:
                    os.utime(self._path)

    def _refusal(self, holder: Holder) -> str:
        return (
            f"{self._path.parent} is in use by process {holder.pid} on {holder.host}, and two runs in one folder would undo "
            f"each other: end that one, or give this one another run.name; if it is gone for certain, remove {self._path}"
        )


def _is_foreign(path: Path) -> bool:
    """Whether something is there that no run made; a pipe could not even be read."""
    with contextlib.suppress(FileNotFoundError):
        return not stat.S_ISREG(path.lstat().st_mode)
    return False


def _read(path: Path) -> Holder | None:
    """None where there is no lock, or one that nobody can have written."""
    try:
        content: Any = json.loads(path.read_text())
        return Holder(**content)
    except (OSError, ValueError, TypeError):
        return None
