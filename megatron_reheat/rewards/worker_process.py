"""The pool's end of one reward worker: its process, what it is working on, and until when."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_reheat.config import RewardConfig
from megatron_reheat.processes import helper_environment
from megatron_reheat.rewards.protocol import CHUNK, MAX_REPLIES_BYTES
from megatron_reheat.types import Reward

if TYPE_CHECKING:
    from megatron_reheat.rewards.pool import Grading

WORKER_MODULE = "megatron_reheat.rewards.worker"
START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 5.0
# The supervisor ends an item whose time is up; only if it does not answer either, the whole worker is replaced.
SUPERVISOR_GRACE_S = 0.7


@dataclass(eq=False)
class Task:
    """One text to be graded against one verifier, which is pickled, so that each item gets a copy of its own.

    `beside` tells whether it was handed out while others were still being sampled; `raised`, whether its grader did.
    """

    text: str
    verifier: bytes
    grading: Grading
    reward: Reward | None = None
    beside: bool = False
    raised: bool = False


class Worker:
    """One worker process: `assigned[0]` is under its grader, with the running number `number`."""

    def __init__(self, config: RewardConfig, module: str = WORKER_MODULE) -> None:
        self.connection, theirs = Pipe()
        command = [sys.executable, "-W", "ignore", "-m", module]
        self._process = subprocess.Popen(
            [*command, str(theirs.fileno()), config.kind, str(config.timeout_s), *_own_functions(config)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=worker_environment(config.sandbox),
        )
        theirs.close()
        self.assigned: deque[Task] = deque()
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

    def send(self, chunk: Sequence[Task], number: int) -> bool:
        """Hands over work, whose first item has this running number; False if the process is gone."""
        self.assigned.extend(chunk)
        self.number = number
        self.deadline = time.monotonic() + self._allowed_s
        items = pickle.dumps([(task.text, task.verifier) for task in chunk], pickle.HIGHEST_PROTOCOL)
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

    def finish(self) -> Task:
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


def worker_environment(confined: bool) -> dict[str, str]:
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
