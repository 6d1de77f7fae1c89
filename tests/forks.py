"""Processes that begin with all that a rank imports, which takes longer than many a test: forks of one that has imported it."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron_reheat.ports import free_port

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.imported"])  # by the first fork of the session


def start_fork(target: Callable[..., object], *args: Any, log: Path, **environment: str) -> BaseProcess:
    """Runs `target(*args)`; what that prints goes to `log`, and an exception to its end. The exit code is 1 then."""
    process = _CONTEXT.Process(target=_run, args=(target, args, log, environment))
    process.start()
    return process


def run_ranks(target: Callable[..., object], *args: Any, world_size: int, logs: Path, timeout_s: float) -> None:
    """`target(*args)` on every rank of a job, as torchrun would start it; rank N prints into `logs`/log-N.txt.

    A rank that fails ends the others, and its output is shown.
    """
    job = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    log_files = [logs / f"log-{rank}.txt" for rank in range(world_size)]
    processes = [
        start_fork(target, *args, log=log, RANK=str(rank), LOCAL_RANK=str(rank), **job)
        for rank, log in enumerate(log_files)
    ]
    try:
        failed = _wait(processes, timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.join()
    if failed is not None:
        how = f"rank {failed} of {world_size} exited {processes[failed].exitcode}"
        raise AssertionError(f"{target.__name__}{args}: {how}\n{log_files[failed].read_text()[-4000:]}")


def _wait(processes: list[BaseProcess], timeout_s: float) -> int | None:
    """The first rank seen to fail or, after `timeout_s`, not to have ended; None when all have ended well."""
    deadline = time.monotonic() + timeout_s
    running = dict(enumerate(processes))
    while running:
        wait([process.sentinel for process in running.values()], deadline - time.monotonic())
        ended = [rank for rank, process in running.items() if not process.is_alive()]
        for rank in ended:
            if running.pop(rank).exitcode:
                return rank
        if not ended:
            return min(running)
    return None


def _run(target: Callable[..., object], args: tuple[Any, ...], log: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with log.open("wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    warnings.simplefilter("ignore")
    try:
        target(*args)
    except BaseException:
        # at once: an orderly exit of a rank would wait for ranks that are still inside a collective
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
