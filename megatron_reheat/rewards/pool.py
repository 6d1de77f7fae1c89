"""Grading in worker processes that can be killed.

A verifier is third-party code running on model text: it can loop for ever, exhaust memory or crash, and the text may be
hostile. Each worker is a fresh interpreter, not a fork of the trainer (which holds threads, torch and accelerators). The
process in it that sees the answers cannot address the trainer: its supervisor (`worker`) speaks with us, and all that we
accept from that is a numbered record of fixed size per item, never a pickle.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import signal
import struct
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
from megatron_reheat.errors import ConfigError, ReheatError
from megatron_reheat.processes import helper_environment
from megatron_reheat.rewards.boxes import graded_part
from megatron_reheat.rewards.functions import MAX_VALUE, short_name
from megatron_reheat.rewards.protocol import (
    CHUNK,
    CORRECT,
    DIED,
    ERROR,
    INCORRECT,
    MAX_REPLIES_BYTES,
    READY,
    REPLY,
    TIMED_OUT,
    USELESS,
)
from megatron_reheat.types import Reward

logger = logging.getLogger(__name__)

Item = tuple[str, Mapping[str, Any]]
_Task = tuple[str, bytes]  # the verifier is pickled, so that each item gets a copy of its own

WORKER_MODULE = "megatron_reheat.rewards.worker"
START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 5.0
# The supervisor ends an item whose time is up; only if it does not answer either, the whole worker is replaced.
SUPERVISOR_GRACE_S = 0.7
MAX_FAILED_STARTS = 3
MAX_CHUNK = 16


class VerifierPool:
    """Grades responses in `config.workers` processes, started by the first `grade` and kept until `close`.

    An item that runs longer than `config.timeout_s`, or whose grader dies under it, is incorrect with `timed_out` set;
    the grader is replaced and every other item is graded as usual. Not thread-safe.

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
        self._config = config
        self._worker_module = worker_module
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._next_number = 0
        self._defences: bytes | None = None

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def worker_pids(self) -> list[int]:
        """Of the workers that are kept now, not of their graders; empty before the first `grade`."""
        return [worker.pid for worker in self._workers]

    def close(self) -> None:
        """Ends the workers. A later `grade` starts new ones."""
        while self._workers:
            self._workers.pop().end()

    def grade(self, items: Sequence[Item]) -> list[Reward]:
        """One reward per (response text, prompt.verifier), in order; equal texts for one verifier are graded once.

        Raises:
            ReheatError: the workers cannot be started, or a reward function failed on all of several responses.
            ConfigError: a reward function cannot be imported.
        """
        slots: dict[tuple[str, int], int] = {}
        packed: dict[int, bytes] = {}
        tasks: list[_Task] = []
        slot_of_item = []
        for text, verifier in items:
            answer = self._relevant(text)
            slot = slots.setdefault((answer, id(verifier)), len(tasks))
            if slot == len(tasks):
                if id(verifier) not in packed:
                    packed[id(verifier)] = pickle.dumps(verifier, pickle.HIGHEST_PROTOCOL)
                tasks.append((answer, packed[id(verifier)]))
            slot_of_item.append(slot)
        errors = self.errors
        try:
            rewards = self._grade_tasks(tasks)
            if self._config.kind == "function" and self.errors - errors == len(tasks) >= MAX_CHUNK:
                raise ReheatError(f"reward.function failed on all of {len(tasks)} responses: {self.last_error}")
        except BaseException:
            self.close()  # a worker still busy with this batch would answer the next one
            raise
        return [rewards[slot] for slot in slot_of_item]

    def _relevant(self, text: str) -> str:
        if self._config.kind == "function":
            return text
        return graded_part(text, self._config.answer_chars) if self._config.kind == "math" else text.strip()

    def _grade_tasks(self, tasks: list[_Task]) -> dict[int, Reward]:
        rewards: dict[int, Reward] = {}
        pending = deque(range(len(tasks)))
        while len(rewards) < len(tasks):
            while len(self._workers) < min(self._config.workers, len(tasks)):
                self._workers.append(_Worker(self._config, self._worker_module))
            for worker in list(self._workers):
                if worker.idle and pending:
                    chunk = self._take_chunk(pending)
                    if not worker.send(chunk, tasks, self._next_number):
                        self._replace(worker, pending)
                    self._next_number += len(chunk)
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
        message = worker.receive()
        if not worker.ready and message.startswith(READY):
            worker.start()
            self._failed_starts = 0
            self._tell_defences(message.removeprefix(READY))
            return
        if not worker.ready and message.startswith(USELESS):
            raise ConfigError(message.removeprefix(USELESS).decode(errors="replace"))
        if not worker.ready or not message or len(message) % REPLY.size:
            self._fail(worker, pending, rewards)
            return
        for number, verdict, values, note in REPLY.iter_unpack(message):
            reward = self._reward(verdict, values) if verdict <= DIED else None
            if reward is None or not worker.assigned or number != worker.number:
                self._fail(worker, pending, rewards)
                return
            rewards[worker.finish()] = reward
            self.timeouts += verdict == TIMED_OUT
            self.restarts += verdict in (TIMED_OUT, DIED)
            if verdict == ERROR:
                self._count_error(note.rstrip(b"\0"))

    def _tell_defences(self, defences: bytes) -> None:
        if defences != self._defences:
            log = logger.warning if b"missing" in defences else logger.info
            log("graders of model text run behind: %s", defences.decode())
            self._defences = defences

    @property
    def _lost(self) -> Reward:
        return Reward(self._config.incorrect, correct=False, timed_out=True)

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

    def _fail(self, worker: _Worker, pending: deque[int], rewards: dict[int, Reward]) -> None:
        """The whole worker is stuck or dead: the item under it is lost, those behind it go back to the queue."""
        if worker.assigned:
            rewards[worker.finish()] = self._lost
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
    """One worker and what it is working on: `assigned[0]` is under its grader, with the running number `number`."""

    def __init__(self, config: RewardConfig, module: str = WORKER_MODULE) -> None:
        self.connection, theirs = Pipe()
        command = [sys.executable, "-W", "ignore", "-m", module]
        self._process = subprocess.Popen(
            [*command, str(theirs.fileno()), config.kind, str(config.timeout_s), *_own_functions(config)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=_worker_environment(config.sandbox),
        )
        theirs.close()
        self.assigned: deque[int] = deque()
        self.number = 0
        self.ready = False
        self.deadline = time.monotonic() + START_TIMEOUT_S
        self._allowed_s = config.timeout_s + SUPERVISOR_GRACE_S

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def idle(self) -> bool:
        return self.ready and not self.assigned

    def start(self) -> None:
        self.ready = True
        self.deadline = float("inf")

    def send(self, chunk: list[int], tasks: list[_Task], number: int) -> bool:
        """Hands over work, whose first item has this running number; False if the process is gone."""
        self.assigned.extend(chunk)
        self.number = number
        self.deadline = time.monotonic() + self._allowed_s
        items = pickle.dumps([tasks[i] for i in chunk], pickle.HIGHEST_PROTOCOL)
        if self._process.poll() is not None:
            return False  # its supervisor may take a moment longer to go
        try:
            self.connection.send_bytes(CHUNK.pack(number, len(chunk)) + items)
        except OSError:
            return False
        return True

    def receive(self) -> bytes:
        """The next replies, or nothing if the process is gone or talks nonsense."""
        try:
            return self.connection.recv_bytes(MAX_REPLIES_BYTES)
        except (EOFError, OSError):
            return b""

    def finish(self) -> int:
        """Takes the item under the grader off the list; the next one's time starts now."""
        done = self.assigned.popleft()
        self.number += 1
        self.deadline = time.monotonic() + self._allowed_s if self.assigned else float("inf")
        return done

    def end(self) -> int:
        """Ends the worker with all its processes and reaps it; its exit status."""
        self.connection.close()
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def _own_functions(config: RewardConfig) -> list[str]:
    if config.function is None:
        return []
    return [json.dumps({"weights": config.function, "correct_at": config.correct_at, "sandbox": config.sandbox})]


def _worker_environment(confined: bool) -> dict[str, str]:
    """Only what an interpreter needs: a verifier has no use for tokens, or for the variables of torchrun.

    One that is not `confined` gets all but the latter.
    """
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "PYTHONHOME")
    package_root = str(Path(__file__).resolve().parents[2])
    search_path = [package_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    single_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = helper_environment()
    if confined:
        environment = {name: environment[name] for name in kept if name in environment}
    return environment | single_thread | {"PYTHONPATH": os.pathsep.join(search_path)}
