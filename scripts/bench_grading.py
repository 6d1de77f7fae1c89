"""Honest answers graded per second, here and in another checkout, in turns so that both meet the same load.

    git worktree add ../before HEAD~1
    python -m scripts.bench_grading --against ../before

Each task's references are graded against themselves by `VerifierPool`, every batch with answers that no pool has seen. A
checkout is measured by this file run with its package on the path, which has to have `VerifierPool` and nothing else of today.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import reasoning_gym

from megatron_reheat.config import RewardConfig
from megatron_reheat.rewards.pool import VerifierPool

HERE = Path(__file__).resolve()
# answers in a batch: enough for a few tenths of a second
REASONING_GYM = {
    "countdown": 800,
    "chain_sum": 6000,
    "word_sorting": 2000,
    "number_sorting": 1000,
    "simple_integration": 40,
    "intermediate_integration": 12,
    "polynomial_multiplication": 60,
}
MATH = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout of the repository")
    parser.add_argument("--batches", type=int, default=9, help="measured for each task and checkout, in turns")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tasks", nargs="*", default=[*REASONING_GYM, "math"])
    parser.add_argument("--serve", nargs=2, metavar=("TASK", "WORKERS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve[0], int(arguments.serve[1]))
        return
    checkouts = [HERE.parents[1], *([arguments.against.resolve()] if arguments.against else [])]
    ratios = {}
    print(
        f"{'task':26} {'answers/s here':>15} {'CPU ms/answer':>14} {'answers/s there':>16} {'CPU ms/answer':>14} {'ratio':>6}"
    )
    for task in arguments.tasks:
        servers = [Server(checkout, task, arguments.workers) for checkout in checkouts]
        figures: list[list[tuple[float, float]]] = [[] for _ in servers]
        for batch in range(arguments.batches + 1):  # the first starts the workers and fills caches
            order = list(zip(servers, figures, strict=True))
            for server, measured in order if batch % 2 else reversed(order):
                measured.append(server.grade(batch))
        for server in servers:
            server.end()
        medians = [tuple(statistics.median(column) for column in zip(*rows[1:], strict=True)) for rows in figures]
        cells = " ".join(f"{rate:15.0f} {1000 * cpu:14.3f}" for rate, cpu in medians)
        if len(medians) == 2:
            ratios[task] = statistics.median(
                ours[0] / theirs[0] for ours, theirs in zip(*(r[1:] for r in figures), strict=True)
            )
            cells += f" {ratios[task]:7.2f}"
        print(f"{task:26} {cells}", flush=True)
    if ratios:
        print(f"geometric mean of the ratios: {statistics.geometric_mean(ratios.values()):.2f}")


class Server:
    """A process with one checkout's pool."""

    def __init__(self, checkout: Path, task: str, workers: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE), "--serve", task, str(workers)],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def grade(self, batch: int) -> tuple[float, float]:
        """(answers per second, CPU seconds per answer of the pool's processes)"""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{batch}\n")
        self._process.stdin.flush()
        rate, cpu = map(float, self._process.stdout.readline().split())
        return rate, cpu

    def end(self) -> None:
        self._process.communicate()


def serve(task: str, workers: int) -> None:
    """Grades the batch named on each line of the input and answers with a line of figures."""
    kind: Any = "math" if task == "math" else "reasoning_gym"
    with VerifierPool(RewardConfig(kind=kind, workers=workers, timeout_s=60.0)) as pool:
        for line in sys.stdin:
            items = math_items(int(line)) if task == "math" else task_items(task, int(line))
            cpu, began = cpu_seconds(), time.perf_counter()
            rewards = pool.grade(items)
            took = time.perf_counter() - began
            assert sum(reward.correct for reward in rewards) >= 0.8 * len(items), "these answers are right"
            print(len(items) / took, (cpu_seconds() - cpu) / len(items), flush=True)


def cpu_seconds() -> float:
    """Of this process and its descendants that live."""
    this = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in [this, *this.children(recursive=True)])


def task_items(task: str, batch: int) -> list[tuple[str, dict[str, Any]]]:
    if task == "countdown":  # reasoning-gym takes longer to make one than to grade it
        return [countdown(n) for n in range(batch * REASONING_GYM[task], (batch + 1) * REASONING_GYM[task])]
    entries = reasoning_gym.create_dataset(task, seed=1000 * batch, size=REASONING_GYM[task])
    return [(f"<answer>{entry['answer']}</answer>", {"task": task, "entry": entry}) for entry in entries]


def countdown(n: int) -> tuple[str, dict[str, Any]]:
    a, b, c, d = (n * prime % 97 + 2 for prime in (11, 13, 17, 19))
    metadata = {"numbers": [c, a, d, b], "target": a * (b + c) - d}
    return f"<answer>{a}*({b} + {c}) - {d}</answer>", {"task": "countdown", "entry": {"metadata": metadata}}


def math_items(batch: int) -> list[tuple[str, dict[str, Any]]]:
    shapes = [
        ("{n}", "{n}"),
        (r"\frac{{{n}}}{{7}}", "{n}/7"),
        ("{n}x^2+1", "1+{n}x^2"),
        (r"{n}\sqrt{{3}}", r"\sqrt{{3}} \cdot {n}"),
        ("({n}, {n}+1)", "({n}, {n}+1)"),
    ]
    numbers = range(10 + MATH * batch, 10 + MATH * batch + MATH // len(shapes))
    return [
        (f"so it is \\boxed{{{answer.format(n=n)}}}", {"answer": reference.format(n=n)})
        for n in numbers
        for answer, reference in shapes
    ]


if __name__ == "__main__":
    main()
