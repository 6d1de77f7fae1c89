"""Grading in worker processes that can be killed.

A verifier is third-party code running on model text: it can loop for ever, exhaust memory or crash. Each worker is a
fresh interpreter, not a fork of the trainer (which holds threads, torch and accelerators), and all that the parent
accepts back from it is a few bytes per item, never a pickle.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_reheat.config import RewardConfig
from megatron_reheat.errors import ReheatError
from megatron_reheat.rewards.protocol import CORRECT, ERROR, INCORRECT, MAX_REPLY_BYTES, READY
from megatron_reheat.types import Reward

logger = logging.getLogger(__name__)

Item = tuple[str, Mapping[str, Any]]

START_TIMEOUT_S = 120.0
MAX_FAILED_STARTS = 3
MAX_CHUNK = 16


class VerifierPool:
    """Grades responses in `config.workers` processes, started by the first `grade` and kept until `close`.

    An item that runs longer than `config.timeout_s`, or whose worker dies under it, is incorrect with `timed_out` set;
    the worker is replaced and every other item is graded as usual. Not thread-safe.

    Counters since construction: `timeouts` (items over the limit), `restarts` (workers replaced, for any reason) and
    `errors` (graders that raised; such an item is incorrect).
    """

    def __init__(self, config: RewardConfig) -> None:
        self.timeouts = 0
        self.restarts = 0
        self.errors = 0
        self._config = config
        self._workers: list[_Worker] = []
        self._failed_starts = 0

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def worker_pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    def close(self) -> None:
        """Ends the workers. A later `grade` starts new ones."""
        while self._workers:
            self._workers.pop().end()

    def grade(self, items: Sequence[Item]) -> list[Reward]:
        """One reward per (response text, prompt.verifier), in order; equal texts for one verifier are graded once.

        Raises:
            ReheatError: the workers cannot be started.
        """
        slots: dict[tuple[str, int], int] = {}
        tasks: list[Item] = []
        slot_of_item = []
        for text, verifier in items:
            answer = self._relevant(text)
            slot = slots.setdefault((answer, id(verifier)), len(tasks))
            if slot == len(tasks):
                tasks.append((answer, verifier))
            slot_of_item.append(slot)
        try:
            rewards = self._grade_tasks(tasks)
        except BaseException:
            self.close()  # a worker still busy with this batch would answer the next one
            raise
        return [rewards[slot] for slot in slot_of_item]

    def _relevant(self, text: str) -> str:
        text = text.strip()
        return text[-self._config.answer_chars :] if self._config.kind == "math" else text

    def _grade_tasks(self, tasks: list[Item]) -> dict[int, Reward]:
        rewards: dict[int, Reward] = {}
        pending = deque(range(len(tasks)))
        while len(rewards) < len(tasks):
            while len(self._workers) < min(self._config.workers, len(tasks)):
                self._workers.append(_Worker(self._config))
            for worker in list(self._workers):
                if worker.idle and pending and not worker.send(self._take_chunk(pending), tasks):
                    self._replace(worker, pending)
            connections = {worker.connection: worker for worker in self._workers}
            earliest = min((worker.deadline for worker in self._workers), default=time.monotonic())
            answered = wait(list(connections), timeout=max(0.0, earliest - time.monotonic()))
            for connection, worker in connections.items():
                if connection in answered:
                    self._receive(worker, pending, rewards)
                elif time.monotonic() > worker.deadline:
                    self.timeouts += worker.ready
                    self._fail(worker, pending, rewards)
        return rewards

    def _take_chunk(self, pending: deque[int]) -> list[int]:
        # Small chunks near the end, so that no worker sits on a queue while another has nothing to do.
        size = min(MAX_CHUNK, -(-len(pending) // (2 * len(self._workers))))
        return [pending.popleft() for _ in range(size)]

    def _receive(self, worker: _Worker, pending: deque[int], rewards: dict[int, Reward]) -> None:
        reply = worker.receive()
        if reply == READY and not worker.ready:
            worker.start()
            self._failed_starts = 0
        elif worker.assigned and reply in (CORRECT, INCORRECT):
            rewards[worker.finish()] = self._reward(reply == CORRECT)
        elif worker.assigned and reply.startswith(ERROR):
            rewards[worker.finish()] = self._reward(False)
            self._count_error(reply.removeprefix(ERROR))
        else:
            self._fail(worker, pending, rewards)

    def _reward(self, correct: bool, timed_out: bool = False) -> Reward:
        return Reward(self._config.correct if correct else self._config.incorrect, correct, timed_out)

    def _count_error(self, message: bytes) -> None:
        log = logger.debug if self.errors else logger.warning
        log("grader %s raised %s; counted as incorrect", self._config.kind, message.decode(errors="replace"))
        self.errors += 1

    def _fail(self, worker: _Worker, pending: deque[int], rewards: dict[int, Reward]) -> None:
        """The worker is stuck or dead: the item under it is lost, the items behind it go back to the queue."""
        if worker.assigned:
            rewards[worker.finish()] = self._reward(False, timed_out=True)
        elif not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise ReheatError(
                    f"{self._failed_starts} reward workers in a row did not start (exit status {worker.end()}); "
                    f"`{sys.executable} -c 'import megatron_reheat.rewards.graders'` shows why"
                )
        self._replace(worker, pending)

    def _replace(self, worker: _Worker, pending: deque[int]) -> None:
        worker.end()
        pending.extendleft(reversed(worker.assigned))
        self._workers.remove(worker)
        self.restarts += 1


class _Worker:
    """One process and what it is working on: `assigned[0]` is under its grader, the rest waits in its pipe."""

    def __init__(self, config: RewardConfig) -> None:
        self.connection, theirs = Pipe()
        command = [sys.executable, "-W", "ignore", "-m", "megatron_reheat.rewards.worker"]
        self._process = subprocess.Popen(
            [*command, str(theirs.fileno()), config.kind, str(config.timeout_s)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=_worker_environment(),
        )
        theirs.close()
        self.assigned: deque[int] = deque()
        self.ready = False
        self.deadline = time.monotonic() + START_TIMEOUT_S
        self._timeout_s = config.timeout_s

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def idle(self) -> bool:
        return self.ready and not self.assigned

    def start(self) -> None:
        self.ready = True
        self.deadline = float("inf")

    def send(self, chunk: list[int], tasks: list[Item]) -> bool:
        """Hands over work; False if the process is gone."""
        self.assigned.extend(chunk)
        self.deadline = time.monotonic() + self._timeout_s
        try:
            self.connection.send([tasks[i] for i in chunk])
        except OSError:
            return False
        return True

    def receive(self) -> bytes:
        """The next reply, or nothing if the process is gone or talks nonsense."""
        try:
            return self.connection.recv_bytes(MAX_REPLY_BYTES)
        except (EOFError, OSError):
            return b""

    def finish(self) -> int:
        """Takes the item under the grader off the list; the next one's time starts now."""
        done = self.assigned.popleft()
        self.deadline = time.monotonic() + self._timeout_s if self.assigned else float("inf")
        return done

    def end(self) -> int:
        """Kills and reaps the process; its exit status."""
        self.connection.close()
        self._process.kill()
        return self._process.wait()


def _worker_environment() -> dict[str, str]:
    """Only what an interpreter needs: a verifier has no use for tokens, or for the variables of torchrun."""
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "PYTHONHOME")
    package_root = str(Path(__file__).resolve().parents[2])
    search_path = [package_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    single_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    return environment | single_thread | {"PYTHONPATH": os.pathsep.join(search_path)}
