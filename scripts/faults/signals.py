"""Every signal that may stop a run, at every point of a step: the status it ends with, and what is saved.

    python -m scripts.faults.signals [--ranks 1 2] [--phases start-up rollout update save] [--signals SIGTERM "Ctrl-C twice"]

Each is sent to a real run while it does what it should be sent in; then the same command goes on to the next. After a notice
(SIGUSR1, SIGTERM, a first Ctrl-C) the last step must be saved; after the others, no checkpoint may be damaged; after all,
nothing may live on. In the end every step's metrics (without times) have to equal those of a run that was left alone. Exits
with 1 if anything went wrong.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_reheat.rewards.sandbox import adopt_orphans
from megatron_reheat.run_folder import RunFolder
from megatron_reheat.stop_request import REQUEUE_EXIT_CODE
from scripts.faults.random_kills import Attempt, damaged, make_recipe, phase_of, reap, wait_until_gone
from tests.e2e import runs

LAYOUTS = {1: ("parallel.data=1",), 2: ("parallel.data=1", "parallel.tensor=2")}
PHASES = ("start-up", "rollout", "update", "save")
STEPS = 1000  # more than are ever made
AGAIN_AFTER_S = 0.05


@dataclass(frozen=True)
class Case:
    """What is sent, and the exit status of one process and of a launcher."""

    send: Callable[[Attempt], None]
    status: tuple[int, int]
    overrides: tuple[str, ...] = ()

    @property
    def saves(self) -> bool:
        return self.status[0] == REQUEUE_EXIT_CODE


def _one(number: signal.Signals, *, to_all: bool = False) -> Callable[[Attempt], None]:
    return lambda attempt: attempt.send(number, to_all=to_all)


def _twice(attempt: Attempt) -> None:
    attempt.send(signal.SIGINT)
    time.sleep(AGAIN_AFTER_S)  # two that come together are one
    attempt.send(signal.SIGINT)


SAVED = (REQUEUE_EXIT_CODE, REQUEUE_EXIT_CODE)
CASES = {
    "SIGUSR1": Case(_one(signal.SIGUSR1), SAVED),
    "SIGTERM": Case(_one(signal.SIGTERM), SAVED),
    "SIGTERM to all": Case(_one(signal.SIGTERM, to_all=True), SAVED),
    "Ctrl-C": Case(_one(signal.SIGINT), SAVED),
    "Ctrl-C twice": Case(_twice, (130, 130)),
    "SIGTERM, no grace": Case(_one(signal.SIGTERM), (143, 143), ("run.stop_grace_s=0",)),
    "SIGHUP": Case(_one(signal.SIGHUP), (-signal.SIGHUP, 128 + signal.SIGHUP)),
    "SIGQUIT": Case(_one(signal.SIGQUIT), (-signal.SIGQUIT, 128 + signal.SIGQUIT)),
    "SIGKILL": Case(_one(signal.SIGKILL), (-signal.SIGKILL, -signal.SIGKILL)),
}


def is_in(phase: str, attempt: Attempt) -> bool:
    now = phase_of(attempt.last_calls())
    if phase == "start-up":
        return now == "start-up: engine, model"
    return now.rpartition(": ")[2] == phase


def wait_for(phase: str, attempt: Attempt) -> None:
    """
    Raises:
        RuntimeError: the run ends before, or does not come so far.
    """
    until = time.monotonic() + runs.LIMIT_S
    while not is_in(phase, attempt):
        if attempt.ended or time.monotonic() > until:
            raise RuntimeError(f"no {phase}: status {attempt.status}, {attempt.errors[-500:]}")
        time.sleep(0.002)


def last_step(run: Path) -> int:
    steps = runs.steps_of(run)
    return steps[-1]["step"] if steps else 0


def strike(name: str, phase: str, recipe: Path, root: Path, ranks: int) -> Iterator[str]:
    """What is wrong."""
    case, folder = CASES[name], RunFolder(root / "run")
    before = folder.saved_step or 0
    attempt = Attempt(recipe, root, (*LAYOUTS[ranks], f"run.steps={STEPS}", *case.overrides))
    wait_for(phase, attempt)
    case.send(attempt)
    attempt.wait(runs.LIMIT_S)
    left, _ = wait_until_gone()
    reap()
    if attempt.status != case.status[ranks - 1]:
        yield f"status {attempt.status}, not {case.status[ranks - 1]}: {attempt.errors[-300:]}"
    if left:
        yield f"{left} processes left"
    yield from damaged(folder.path)
    saved = folder.saved_step or 0
    if saved < before or (case.saves and saved != max(before, last_step(folder.path))):
        yield f"step {last_step(folder.path)} was made, {saved} is saved, {before} was before"
    if "Traceback" in attempt.errors:
        yield f"a traceback: {attempt.errors[-300:]}"


def undisturbed(recipe: Path, root: Path, ranks: int, steps: int) -> list[dict[str, object]]:
    attempt = Attempt(recipe, root, (*LAYOUTS[ranks], f"run.steps={STEPS}"))
    while not attempt.ended and last_step(root / "run") < steps:
        time.sleep(0.1)
    attempt.send(signal.SIGUSR1)
    attempt.wait(runs.LIMIT_S)
    wait_until_gone()
    return [runs.numbers_of(step) for step in runs.steps_of(root / "run")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--signals", nargs="+", choices=CASES, default=list(CASES))
    parsed = parser.parse_args(arguments)
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        return strike_all(parsed.ranks, parsed.phases, parsed.signals)
    finally:  # of one that is interrupted, too
        wait_until_gone()


def strike_all(layouts: Sequence[int], phases: Sequence[str], signals: Sequence[str]) -> int:
    """The exit status."""
    wrong = 0
    table = Table("signal", "ranks", *phases)
    with tempfile.TemporaryDirectory() as temporary:
        recipe = make_recipe(Path(temporary))
        for ranks in layouts:
            root = Path(temporary) / str(ranks)
            for name in signals:
                cells = []
                for phase in phases:
                    problems = list(strike(name, phase, recipe, root, ranks))
                    wrong += bool(problems)
                    print(f"{name}, {ranks} rank(s), {phase}:", *(problems or ["ok"]), sep="\n  ", flush=True)
                    status = CASES[name].status[ranks - 1]
                    cells.append("WRONG" if problems else f"{status}, {'saved' if CASES[name].saves else 'whole'}")
                table.add_row(name, str(ranks), *cells)
            steps = [runs.numbers_of(step) for step in runs.steps_of(root / "run")]
            alone = undisturbed(recipe, Path(temporary) / f"{ranks}, undisturbed", ranks, len(steps))
            equal = steps == alone[: len(steps)]
            wrong += not equal
            print(
                f"{ranks} rank(s): {len(steps)} steps, {'equal to the bit' if equal else 'WRONG: other metrics'}",
                flush=True,
            )
    console = Console(width=120)
    console.print(table)
    print("status, and whether the last step is saved or the checkpoints before it are whole")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
