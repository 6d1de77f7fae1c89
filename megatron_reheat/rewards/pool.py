"""Grading in worker processes that can be killed, beside whatever the caller does meanwhile.

A verifier is third-party code running on model text: it can loop for ever, exhaust memory or crash, and the text may be
hostile. Each worker is a fresh interpreter, not a fork of the trainer (which holds threads, torch and accelerators). The
process in it that sees the answers cannot address the trainer: its supervisor (`worker`) speaks with us, and all that we
accept from that is a numbered record of fixed size per item, never a pickle.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any

from megatron_reheat.config import RewardConfig
from megatron_reheat.errors import ConfigError, ReheatError
from megatron_reheat.rewards.boxes import graded_part
from megatron_reheat.rewards.functions import MAX_VALUE, short_name
from megatron_reheat.rewards.protocol import CORRECT, DIED, ERROR, INCORRECT, READY, REPLY, TIMED_OUT, USELESS
from megatron_reheat.rewards.worker_process import WORKER_MODULE, Task, Worker
from megatron_reheat.types import Reward

logger = logging.getLogger(__name__)

Item = tuple[str, Mapping[str, Any]]

MAX_FAILED_STARTS = 3
MAX_CHUNK = 16


class Grading:
    """Responses that are graded together, from when they are added; equal texts for one verifier are graded once.

    Time limits are wall time. Until `settle` others may be at work on the same cores, so an answer that is lost before counts
    for nothing: it is graded again afterwards. An answer can thus not be lost because another was sampled meanwhile.
    """

    def __init__(self, pool: VerifierPool) -> None:
        self.settled = False
        self.unfinished = 0  # tasks without a reward
        self.lost: list[Task] = []  # to be graded again once settled
        self.error: BaseException | None = None  # the pool has ended: nothing more will be graded
        self._pool = pool
        self._tasks: dict[tuple[str, int], Task] = {}
        self._packed: dict[
            int, tuple[Mapping[str, Any], bytes]
        ] = {}  # with the verifier, lest its id be taken by another

    def add(self, items: Sequence[Item]) -> list[Task]:
        """Begins to grade (response text, prompt.verifier); returns at once. For one thread at a time, which may be any."""
        tasks, new = [], []
        for text, verifier in items:
            key = (self._pool.relevant(text), id(verifier))
            task = self._tasks.get(key)
            if task is None:
                if id(verifier) not in self._packed:
                    self._packed[id(verifier)] = verifier, pickle.dumps(verifier, pickle.HIGHEST_PROTOCOL)
                task = self._tasks[key] = Task(key[0], self._packed[id(verifier)][1], self)
                new.append(task)
            tasks.append(task)
        self._pool.take(self, new)
        return tasks

    def settle(self) -> None:
        """From here on nothing else is at work on these cores: what is lost now is lost."""
        self._pool.settle(self)

    def rewards(self, tasks: Sequence[Task]) -> list[Reward]:
        """Settles and waits; the rewards of tasks that `add` returned.

        Raises:
            ReheatError: the workers cannot be started, or a reward function failed on all of several responses.
            ConfigError: a reward function cannot be imported.
        """
        self.settle()
        self._pool.wait_for(self)
        self._pool.refuse_useless(tasks)
        return [task.reward for task in tasks if task.reward is not None]


class VerifierPool:
    """Grades responses in `config.workers` processes, started by `start` or the first response and kept until `close`.

    An item that runs longer than `config.timeout_s`, or whose grader dies under it, is incorrect with `timed_out` set;
    the grader is replaced and every other item is graded as usual. A thread of the pool's own speaks with the workers, which
    end with it.

    Counters since construction: `timeouts` (items over the limit), `restarts` (graders or whole workers replaced because
    an item was lost, or for any other reason) and `errors` (graders that raised; such an item is incorrect). `last_error` says
    what the last of them raised.
    """

    def __init__(self, config: RewardConfig, worker_module: str = WORKER_MODULE) -> None:
        """`worker_module` is run by `python -m` in each worker; tests have others."""
        self.timeouts = 0
        self.restarts = 0
        self.errors = 0
        self.last_error = ""
        self.while_sampling = bool(config.while_sampling)
        self._config = config
        self._worker_module = worker_module
        self._workers: list[Worker] = []
        self._failed_starts = 0
        self._next_number = 0
        self._defences: bytes | None = None
        self._changed = threading.Condition()  # holds the lock on everything here but the workers
        self._open: set[Grading] = set()
        self._settled: deque[Task] = deque()  # somebody waits for these, so they come first
        self._beside: deque[Task] = deque()
        self._thread: threading.Thread | None = None
        self._bell: tuple[int, int] | None = None  # a pipe that wakes the thread
        self._closing = False
        self._early = False  # all workers are wanted before there is work for them

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def worker_pids(self) -> list[int]:
        """Of the workers that are kept now, not of their graders; empty before they are started."""
        return [worker.pid for worker in self._workers]

    def close(self) -> None:
        """Ends the workers; what is still being graded is given up. A later `grade` or `begin` starts new ones."""
        with self._changed:
            thread = self._thread
            self._closing = thread is not None
            self._ring()
            if thread is None:
                self._give_up(ReheatError("the graders were ended before they had graded everything"))
        if thread is not None:
            thread.join()

    def start(self) -> None:
        """Begins to start the workers, which import for a second or more, before there is anything to grade; returns at once.

        What goes wrong is said where something is graded, which tries again.
        """
        with self._changed:
            self._early = True
            self._ring()

    def grade(self, items: Sequence[Item]) -> list[Reward]:
        """One reward per (response text, prompt.verifier), in order. Raises as `Grading.rewards`."""
        grading = self.begin()
        grading.settle()
        return grading.rewards(grading.add(items))

    def begin(self) -> Grading:
        """For responses that come one after the other."""
        grading = Grading(self)
        with self._changed:
            self._open.add(grading)
        return grading

    def relevant(self, text: str) -> str:
        """What of a response the graders are shown."""
        if self._config.kind == "function":
            return text
        return graded_part(text, self._config.answer_chars) if self._config.kind == "math" else text.strip()

    # -- what a grading asks for -----------------------------------------------------------------------------------

    def take(self, grading: Grading, tasks: Sequence[Task]) -> None:
        """Queues new tasks, unless the pool has ended since the grading began."""
        with self._changed:
            if grading.error is not None or not tasks:
                return
            grading.unfinished += len(tasks)
            (self._settled if grading.settled else self._beside).extend(tasks)
            self._ring()

    def settle(self, grading: Grading) -> None:
        with self._changed:
            if grading.settled:
                return
            grading.settled = True
            self._settled.extend(task for task in self._beside if task.grading is grading)
            self._beside = deque(task for task in self._beside if task.grading is not grading)
            self._settled.extend(grading.lost)
            grading.lost.clear()
            self._ring()

    def wait_for(self, grading: Grading) -> None:
        """Until every task of a settled grading has a reward; a grading ends with it."""
        try:
            with self._changed:
                self._changed.wait_for(lambda: grading.error is not None or not grading.unfinished)
                self._open.discard(grading)
            if grading.error is not None:
                raise grading.error
        except BaseException:
            self.close()  # interrupted: workers would go on with what nobody waits for
            raise

    def refuse_useless(self, tasks: Sequence[Task]) -> None:
        """
        Raises:
            ReheatError: a reward function of the user's failed on everything.
        """
        distinct = set(tasks)
        if self._config.kind == "function" and len(distinct) >= MAX_CHUNK and all(task.raised for task in distinct):
            self.close()
            raise ReheatError(f"reward.function failed on all of {len(distinct)} responses: {self.last_error}")

    # -- the pool's thread, and under the lock ---------------------------------------------------------------------

    def _ring(self) -> None:
        """Has the thread look again; starts it where there is work and no thread."""
        if self._thread is None and (self._settled or self._beside or self._early):
            self._bell = os.pipe()
            for end in self._bell:
                os.set_blocking(end, False)
            # a daemon: a process that ends without `close` takes it along, and the workers with it
            self._thread = threading.Thread(target=self._run, name="grading", daemon=True)
            self._thread.start()
        if self._bell is not None:
            with suppress(BlockingIOError):  # it rings already
                os.write(self._bell[1], b"!")

    def _run(self) -> None:
        assert self._bell is not None
        bell, error = self._bell[0], None
        try:
            while not self._closing:
                with self._changed:
                    self._hand_out()
                self._answer(bell)
        except BaseException as failure:
            error = failure
        while self._workers:
            self._workers.pop().end()
        with self._changed:
            for end in self._bell:
                os.close(end)
            self._bell = self._thread = None
            self._closing = self._early = False
            self._failed_starts = 0
            self._give_up(error or ReheatError("the graders were ended before they had graded everything"))

    def _give_up(self, error: BaseException) -> None:
        for grading in self._open:
            grading.error = error
        self._open.clear()
        self._settled.clear()
        self._beside.clear()
        self._changed.notify_all()

    def _hand_out(self) -> None:
        outstanding = len(self._settled) + len(self._beside) + sum(len(worker.assigned) for worker in self._workers)
        wanted = self._config.workers if self._early else min(self._config.workers, outstanding)
        while len(self._workers) < wanted:
            self._workers.append(Worker(self._config, self._worker_module))
        for worker in list(self._workers):
            if worker.idle and (self._settled or self._beside):
                chunk = self._take_chunk(self._settled or self._beside)
                if not worker.send(chunk, self._next_number):
                    self._replace(worker)
                self._next_number += len(chunk)

    def _take_chunk(self, queue: deque[Task]) -> list[Task]:
        # Small chunks near the end, so that no worker sits on a queue while another has nothing to do.
        size = min(MAX_CHUNK, -(-len(queue) // (2 * len(self._workers))))
        chunk = [queue.popleft() for _ in range(size)]
        for task in chunk:
            task.beside = not task.grading.settled
        return chunk

    def _answer(self, bell: int) -> None:
        """Waits for the workers, for their deadlines or to be woken, and takes in what has come."""
        connections = {worker.connection: worker for worker in self._workers}
        earliest = min((worker.deadline for worker in self._workers), default=math.inf)
        timeout = None if earliest == math.inf else max(0.0, earliest - time.monotonic())
        answered = wait([bell, *connections], timeout)
        with self._changed:
            if bell in answered:
                os.read(bell, 1 << 16)
            for connection, worker in connections.items():
                if connection in answered:
                    self._receive(worker)
                elif time.monotonic() > worker.deadline and not connection.poll():
                    self._fail(worker, late=True)
            self._changed.notify_all()

    def _receive(self, worker: Worker) -> None:
        message = worker.receive()
        if not worker.ready and message.startswith(READY):
            worker.start()
            self._failed_starts = 0
            self._tell_defences(message.removeprefix(READY))
            return
        if not worker.ready and message.startswith(USELESS):
            raise ConfigError(message.removeprefix(USELESS).decode(errors="replace"))
        if not worker.ready or not message or len(message) % REPLY.size:
            self._fail(worker)
            return
        for number, verdict, values, note in REPLY.iter_unpack(message):
            reward = self._reward(verdict, values) if verdict <= DIED else None
            if reward is None or not worker.assigned or number != worker.number:
                self._fail(worker)
                return
            task = worker.finish()
            self.restarts += verdict in (TIMED_OUT, DIED)
            if verdict in (TIMED_OUT, DIED):
                self._lose(task, late=verdict == TIMED_OUT)
                continue
            if verdict == ERROR:
                self._count_error(note.rstrip(b"\0"))
            task.raised = verdict == ERROR
            self._finish(task, reward)

    def _finish(self, task: Task, reward: Reward) -> None:
        task.reward = reward
        task.grading.unfinished -= 1

    def _lose(self, task: Task, *, late: bool) -> None:
        if not task.beside:
            self.timeouts += late
            self._finish(task, Reward(self._config.incorrect, correct=False, timed_out=True))
        elif task.grading.settled:
            self._settled.append(task)
        else:
            task.grading.lost.append(task)

    def _tell_defences(self, defences: bytes) -> None:
        if defences != self._defences:
            log = logger.warning if b"missing" in defences else logger.info
            log("graders of model text run behind: %s", defences.decode())
            self._defences = defences

    def _reward(self, verdict: int, values: bytes = b"") -> Reward | None:
        """What a verdict is worth; None if the values of reward functions are no numbers."""
        config, correct = self._config, verdict == CORRECT
        if config.function is None or verdict not in (CORRECT, INCORRECT):
            return Reward(config.correct if correct else config.incorrect, correct, verdict in (TIMED_OUT, DIED))
        weights = config.function
        parts = struct.unpack_from(f"!{len(weights)}d", values)
        if not all(abs(part) <= MAX_VALUE for part in parts):
            return None
        total = math.fsum(w * part for w, part in zip(weights.values(), parts, strict=True))
        return Reward(total, correct, parts=dict(zip(map(short_name, weights), parts, strict=True)))

    def _count_error(self, message: bytes) -> None:
        log = logger.debug if self.errors else logger.warning
        self.last_error = message.decode(errors="replace")
        log("grader %s failed: %s; counted as incorrect", self._config.kind, self.last_error)
        self.errors += 1

    def _fail(self, worker: Worker, *, late: bool = False) -> None:
        """The whole worker is stuck or dead: the item under it is lost, those behind it go back to the queue."""
        if worker.assigned:
            self._lose(worker.finish(), late=late)
        elif not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise ReheatError(
                    f"{self._failed_starts} reward workers in a row did not start (exit status {worker.end()}); "
                    f"`{sys.executable} -c 'import megatron_reheat.rewards.graders'` shows why"
                )
        self._replace(worker)

    def _replace(self, worker: Worker) -> None:
        worker.end()
        for task in reversed(worker.assigned):
            (self._settled if task.grading.settled else self._beside).appendleft(task)
        self._workers.remove(worker)
        self.restarts += 1
        self._ring()  # another is needed before there is anything to wait for
