"""Stands between the pool and the process that sees the answers, and never touches an answer itself.

It forks graders from an interpreter that has their modules loaded, so that a new one costs milliseconds, hands them
work, times every item, and believes only records that fit the work handed out. All that it takes from a grader is a
number, a verdict and a short note.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from megatron_reheat.rewards.grader_process import grade_chunks
from megatron_reheat.rewards.protocol import CHUNK, CORRECT, DIED, ERROR, INCORRECT, ORDER, RECORD, REPLY, TIMED_OUT
from megatron_reheat.rewards.sandbox import SystemCallFilter, adopt_orphans, end_descendants, end_namespace

if TYPE_CHECKING:
    from megatron_reheat.rewards.graders import Grader

READ_BYTES = 128 * RECORD.size
# An idle grader reads at once; one that does not within this time was left so by an earlier answer, and is replaced.
TAKES_WORK_S = 0.5


class PoolEnded(Exception):
    """Nobody waits for replies any more."""


class Supervisor:
    """Serves one pool until that closes its end of `pool`, or until the other end of `lifeline` is closed."""

    def __init__(
        self,
        pool: Connection,
        lifeline: int,
        grader: Grader,
        timeout_s: float,
        in_namespace: bool,
        confined: bool = True,
    ) -> None:
        """`in_namespace` says that this is process 1 of a namespace, all other processes of which it may end. Graders that are
        not `confined` may do what any process may."""
        self.system_calls: SystemCallFilter | None = None  # for graders that are started from now on
        self._pool = pool
        self._lifeline = lifeline
        self._function = grader
        self._timeout_s = timeout_s
        self._in_namespace = in_namespace
        self._confined = confined
        self._grader: _Grader | None = None
        adopt_orphans()
        gc.freeze()  # a collection in a grader would copy every page that it shares with this process

    def serve(self) -> None:
        """Answers chunks until the pool or the lifeline is closed; the grader is ended on the way out."""
        waiting = select.poll()
        waiting.register(self._lifeline, 0)
        waiting.register(self._pool.fileno(), select.POLLIN)
        try:
            while all(fd != self._lifeline for fd, _ in waiting.poll()):
                for replies in self.grade(self._pool.recv_bytes()):
                    self._pool.send_bytes(replies)
        except (EOFError, OSError, PoolEnded):
            return
        finally:
            self._end_grader()

    def grade(self, chunk: bytes) -> Iterator[bytes]:
        """The replies to a chunk's items, in order, as they come.

        An item whose time is up is lost, and so is one under which its grader ends or writes what does not fit. But a
        grader that gave verdicts before may have been left so by an earlier answer: then the item gets a new one first.
        """
        first, count = CHUNK.unpack_from(chunk)
        done = 0
        deadline = time.monotonic() + self._timeout_s
        while done < count:
            grader = self._grader or self._start_grader()
            fits = grader.order(chunk, done, deadline)
            lost = DIED
            while fits and done < count:
                data = self._next_records(grader, deadline)
                if data is None:
                    fits, lost = False, TIMED_OUT
                    break
                replies, fits = grader.replies(data, first + done, first + count)
                if replies:
                    done += len(replies)
                    deadline = time.monotonic() + self._timeout_s
                    yield b"".join(replies)
            if not fits:
                innocent = lost == DIED and grader.answered > 0
                self._end_grader()
                if done < count and not innocent:
                    yield REPLY.pack(first + done, lost, b"", b"")
                    done += 1
                    deadline = time.monotonic() + self._timeout_s

    def _next_records(self, grader: _Grader, deadline: float) -> bytes | None:
        """What the grader has written, nothing if it has ended; None if it has not by the deadline.

        Raises:
            PoolEnded: there is nobody to answer to.
        """
        remaining_ms = max(0.0, deadline - time.monotonic()) * 1000
        waiting = select.poll()
        waiting.register(grader.records, select.POLLIN)
        waiting.register(self._lifeline, 0)
        waiting.register(self._pool.fileno(), 0)
        ready = [fd for fd, _ in waiting.poll(remaining_ms)]
        if self._lifeline in ready or self._pool.fileno() in ready:
            raise PoolEnded
        return os.read(grader.records, READ_BYTES) if ready else None

    def _start_grader(self) -> _Grader:
        self._grader = _Grader.fork(self._function, self.system_calls, self._confined)
        return self._grader

    def _end_grader(self) -> None:
        """Ends the grader and whatever it may have started."""
        if self._grader is None:
            return
        self._grader.end()
        self._grader = None
        if self._in_namespace:
            end_namespace()
        else:
            end_descendants()


@dataclass
class _Grader:
    """One forked process and our ends of its pipes; `answered` counts its verdicts."""

    pid: int
    orders: int
    records: int
    nonce: bytes = b""
    answered: int = 0

    @classmethod
    def fork(cls, grader: Grader, system_calls: SystemCallFilter | None, confined: bool) -> _Grader:
        theirs_in, orders = os.pipe()
        records, theirs_out = os.pipe()
        parent_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                grade_chunks(theirs_in, theirs_out, grader, parent_pid, system_calls, confined)
            finally:
                os._exit(1)
        os.close(theirs_in)
        os.close(theirs_out)
        os.set_blocking(orders, False)
        return cls(pid, orders, records)

    def order(self, chunk: bytes, begin: int, deadline: float) -> bool:
        """Hands over a chunk, of which `begin` items are done; False if the grader does not take it."""
        self.nonce = os.urandom(8)
        rest = memoryview(ORDER.pack(self.nonce, begin, len(chunk)) + chunk)
        if self.answered:
            deadline = min(deadline, time.monotonic() + TAKES_WORK_S)
        waiting = select.poll()
        waiting.register(self.orders, select.POLLOUT)
        while rest:
            try:
                rest = rest[os.write(self.orders, rest) :]
            except BlockingIOError:
                if not waiting.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    return False
            except BrokenPipeError:
                return False
        return True

    def replies(self, data: bytes, number: int, end: int) -> tuple[list[bytes], bool]:
        """The replies in these bytes for the items from `number` up to `end`, and whether nothing else is in them."""
        replies: list[bytes] = []
        whole = len(data) // RECORD.size * RECORD.size  # what was written before the nonsense counts
        for nonce, answered, verdict, values, note in RECORD.iter_unpack(data[:whole]):
            fits = nonce == self.nonce and answered == number + len(replies) < end
            if not fits or verdict not in (CORRECT, INCORRECT, ERROR):
                return replies, False
            replies.append(REPLY.pack(answered, verdict, values, note))
            self.answered += 1
        return replies, bool(data) and whole == len(data)

    def end(self) -> None:
        os.close(self.orders)
        os.close(self.records)
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except ProcessLookupError:
            pass
