"""Hostile answers and attacks against the graders: nothing passes, hangs, or stays behind, and honest answers are graded on.

    python -m scripts.faults.hostile_answers [--answers 1000] [--timeout 2]

1. Hostile answers of every kind in `hostile_kinds`, to the graders as they are.
2. The fifty attacks of `attacks` as answers to the graders as they are.
3. The same with the guards taken away (`unguarded_worker`): reasoning-gym's own scorers evaluate, the audit hook refuses.
4. The same with all guards taken away (`executing_worker`): every attack runs, only the sandbox and the supervisor are left.

Each batch holds honest answers too, whose verdicts have to be right. A lost answer (killed on timeout, or its process died) is
graded once more, alone, and has to have its verdict within its timeout and one second. Exits with 1 if anything went wrong.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from megatron_reheat.config import RewardConfig
from megatron_reheat.rewards.pool import Item, VerifierPool
from megatron_reheat.rewards.sandbox import adopt_orphans
from megatron_reheat.rewards.worker_process import WORKER_MODULE
from scripts.faults.attacks import ATTACKS, WITHIN_MEMORY
from scripts.faults.hostile_kinds import CHAIN_SUM, COUNTDOWN, KINDS, MATH, cases

WORKERS = 2
PROCESSES = 3 * WORKERS
ONE = {"answer": 1}  # for the worker that runs its answers

# (right, wrong) answers of honest models, graded among the hostile ones
HONEST: dict[str, tuple[Item, Item]] = {
    "reasoning_gym": (("<answer>11*4 - 7</answer>", COUNTDOWN), ("<answer>11*4 + 7</answer>", COUNTDOWN)),
    "math": ((r"\boxed{42}", MATH), (r"\boxed{41}", MATH)),
}
UNGUARDED = (("<answer>22</answer>", CHAIN_SUM), ("<answer>21</answer>", CHAIN_SUM))
EXECUTING = (("value = 1", ONE), ("value = 2", ONE))


@dataclass
class Outcome:
    """What came of some hostile answers; all but the first three should be zero."""

    count: int = 0
    lost: int = 0
    slowest_lost_s: float = 0.0
    passed: int = 0
    late: int = 0
    honest_wrong: int = 0
    left: int = 0

    @property
    def failures(self) -> int:
        return self.passed + self.late + self.honest_wrong + self.left

    def __add__(self, other: Outcome) -> Outcome:
        sums = (a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        return Outcome(*sums)  # type: ignore[arg-type]


HEADER = (
    f"{'kind':32} {'count':>5} {'lost':>4} {'slowest':>8} {'passed':>6} {'hangs':>6} {'honest wrong':>12} {'left':>4}"
)


def row(name: str, outcome: Outcome) -> str:
    slowest = f"{outcome.slowest_lost_s:.2f} s" if outcome.lost else ""
    return (
        f"{name:32} {outcome.count:5} {outcome.lost:4} {slowest:>8} {outcome.passed:6} {outcome.late:6} "
        f"{outcome.honest_wrong:12} {outcome.left:4}"
    )


def attack(pool: VerifierPool, hostile: list[Item], honest: tuple[Item, Item], timeout_s: float) -> Outcome:
    """Grades the hostile answers between honest ones, and those that were lost once more, one by one."""
    batch: list[Item] = []
    # Every honest answer differs: equal ones would be graded once for all.
    for number, item in enumerate(hostile):
        for text, verifier in honest:
            batch.append((honest_text(text, number), verifier))
        batch.append(item)
    rewards = pool.grade(batch)
    rights, wrongs, verdicts = rewards[0::3], rewards[1::3], rewards[2::3]
    outcome = Outcome(
        count=len(hostile),
        lost=sum(reward.timed_out for reward in verdicts),
        passed=sum(reward.correct for reward in verdicts),
        honest_wrong=sum(not reward.correct for reward in rights) + sum(reward.correct for reward in wrongs),
    )
    for item, reward in zip(hostile, verdicts, strict=True):
        if reward.timed_out:
            began = time.monotonic()
            outcome.passed += pool.grade([item])[0].correct
            took = time.monotonic() - began
            outcome.late += took > timeout_s + 1.0
            outcome.slowest_lost_s = max(outcome.slowest_lost_s, took)
    outcome.left = max(0, len(psutil.Process().children(recursive=True)) - PROCESSES)
    return outcome


def honest_text(text: str, number: int) -> str:
    return f"{text}  # {number}" if text.startswith("value") else f"{number}: {text}"


def start(kind: str, timeout_s: float, module: str = WORKER_MODULE) -> VerifierPool:
    pool = VerifierPool(RewardConfig(kind=kind, workers=WORKERS, timeout_s=timeout_s), module)  # type: ignore[arg-type]
    honest = EXECUTING if "executing" in module else UNGUARDED if "unguarded" in module else HONEST[kind]
    while True:  # until both workers run
        pool.grade([(honest_text(text, number), verifier) for number in range(64) for text, verifier in honest])
        if all(worker.ready for worker in pool._workers):
            return pool
        time.sleep(0.1)


def hostile_answers(count: int, timeout_s: float) -> Outcome:
    total = Outcome()
    per_kind = -(-count // len(KINDS))
    print(HEADER)
    outcomes: dict[str, Outcome] = {name: Outcome() for name in KINDS}
    for reward_kind in HONEST:
        with start(reward_kind, timeout_s) as pool:
            for name in KINDS:
                hostile: list[Item] = [
                    (text, verifier) for kind, verifier, text in cases(name, per_kind) if kind == reward_kind
                ]
                if hostile:
                    outcomes[name] += attack(pool, hostile, HONEST[reward_kind], timeout_s)
                    print(row(name, outcomes[name]), flush=True)
        outcomes[next(iter(KINDS))].left += len(psutil.Process().children(recursive=True))
    for outcome in outcomes.values():
        slowest = max(total.slowest_lost_s, outcome.slowest_lost_s)
        total = total + outcome
        total.slowest_lost_s = slowest
    print(row(f"{len(KINDS)} kinds", total), flush=True)
    return total


def attacks(
    title: str, programs: Mapping[str, str], module: str, honest: tuple[Item, Item], timeout_s: float
) -> Outcome:
    """Each program on its own, between honest answers; as an expression where answers are expressions."""
    total = Outcome()
    failed = []
    with start("reasoning_gym", timeout_s, module) as pool:
        for name, program in programs.items():
            item: Item = (program, ONE) if "executing" in module else (f"exec({program!r}) or 37", COUNTDOWN)
            outcome = attack(pool, [item], honest, timeout_s)
            # and what a hostile answer may have left behind for those after it
            after = pool.grade(
                [(honest_text(text, number), verifier) for number in range(9) for text, verifier in honest]
            )
            outcome.honest_wrong += sum(not r.correct for r in after[0::2]) + sum(r.correct for r in after[1::2])
            if outcome.failures:
                failed.append(name)
            slowest = max(total.slowest_lost_s, outcome.slowest_lost_s)
            total = total + outcome
            total.slowest_lost_s = slowest
    total.left += len(psutil.Process().children(recursive=True))
    print(row(title, total) + (f"   {', '.join(failed)}" if failed else ""), flush=True)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=1000)
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds for an answer")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    adopt_orphans()  # what the workers leave would become ours, and be counted
    failures = hostile_answers(arguments.answers, arguments.timeout).failures
    worker, unguarded, executing = (
        *(WORKER_MODULE, "scripts.faults.unguarded_worker", "scripts.faults.executing_worker"),
    )
    print(HEADER.replace("kind", "attacks", 1))
    for title, programs, module, honest in (
        ("as answers", ATTACKS, worker, HONEST["reasoning_gym"]),
        ("without guards", {**ATTACKS, **WITHIN_MEMORY}, unguarded, UNGUARDED),
        ("run as programs", ATTACKS, executing, EXECUTING),
    ):
        failures += attacks(title, programs, module, honest, arguments.timeout).failures
    for name, program in WITHIN_MEMORY.items():  # the known limit of the last two lines; a worker for each
        attacks(f"not held: {name}"[:32], {name: program}, executing, EXECUTING, arguments.timeout)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
