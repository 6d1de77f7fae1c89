"""Many short runs on all cores: one process for each, in which the runs take turns on one vLLM engine."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from examples.elsewhere import ROOT
from megatron_reheat.config import Config
from megatron_reheat.processes import die_with_parent
from megatron_reheat.stages.series import RunSeries

T = TypeVar("T")


class Task(Protocol):
    """What one process does from start to end."""

    def do(self, series: RunSeries) -> str:
        """Returns a line to print."""
        ...

    def failed(self, error: Exception) -> None:
        """Puts an error on record; the tasks that come next are tried all the same."""
        ...


def parser_of(text: str | None, seeds: Sequence[int]) -> argparse.ArgumentParser:
    """What every experiment over seeds is asked for; `places_of` reads two of the answers."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(seeds))
    parser.add_argument("--quick", action="store_true", help="a few small steps, to see that everything runs")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes, one on each core")
    parser.add_argument("--runs", type=Path, help="default: a folder of runs/, another one with --quick")
    parser.add_argument("--results", type=Path, help="default: beside this script, with --quick in the runs' folder")
    parser.add_argument("--table", action="store_true", help="only draw what is there")
    return parser


def places_of(options: argparse.Namespace, script: Path) -> tuple[Path, Path]:
    """Where the experiment's runs lie, and where what is worth keeping goes."""
    runs = (options.runs or ROOT / "runs" / (script.stem + "-quick" * options.quick)).resolve()
    return runs, options.results or (runs / "results" if options.quick else script.parent / "results")


def present(
    found: Sequence[T],
    results: Path,
    name: str,
    table: Callable[[Sequence[T]], str],
    draw: Callable[[Sequence[T], Path], None],
) -> None:
    """Writes table and figure of what was found into `results`, and prints the table.

    Raises:
        SystemExit: nothing was found.
    """
    if not found:
        sys.exit(f"there are no results in {results} yet")
    text, figure = table(found), results / f"{name}.png"
    (results / "table.md").write_text(text)
    draw(found, figure)
    print(f"{text}figure: {figure}")


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
