"""Many short runs on all cores: one process for each, in which the runs take turns on one vLLM engine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Protocol

from megatron_reheat.config import Config
from megatron_reheat.processes import die_with_parent
from megatron_reheat.stages.series import RunSeries


class Task(Protocol):
    """What one process does from start to end."""

    def do(self, series: RunSeries) -> str:
        """Returns a line to print."""
        ...

    def failed(self, error: Exception) -> None:
        """Puts an error on record; the tasks that come next are tried all the same."""
        ...


def share_out(tasks: Sequence[Task], first: Config, jobs: int) -> None:
    """Deals the tasks out to `jobs` processes, one on each core, and returns when all are done or have failed.

    Args:
        first: any recipe of the runs, which share layout, engines and verifiers.

    Raises:
        SystemExit: a process ended early.
    """
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    started = [
        context.Process(target=_work, args=(cores[j % len(cores)], tasks[j::jobs], first, os.getpid()))
        for j in range(min(jobs, len(tasks)))
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
        if process.exitcode:
            sys.exit(f"a process ended with status {process.exitcode}; the same command goes on from what is saved")


def _work(core: int, tasks: Sequence[Task], first: Config, parent: int) -> None:
    die_with_parent(parent, "command", signal.SIGTERM)
    os.sched_setaffinity(0, {core})
    with RunSeries(first) as series:
        for task in tasks:
            started = time.monotonic()
            try:
                said = task.do(series)
            except Exception as error:  # of which a night's work is not to end
                said = f"{task} failed: {error}"
                traceback.print_exc()
                task.failed(error)
            print(f"{said} ({time.monotonic() - started:.0f} s)", flush=True)
