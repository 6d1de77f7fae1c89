"""The whole story on two CPU cores: warm start -> RL until the entropy collapses -> reheat -> RL, beside two controls.

    python examples/countdown_cpu/demo.py [--seed 0] [--arms reheat control flatten] [--steps-after 150] [--fresh]

Every run is an ordinary `reheat train` of a recipe in yaml/; this script only makes the model and the problems, calls them
one after the other, and puts what they logged into a table. Runs that are already finished are not repeated. A signal to end
is passed on to what is running (Ctrl-C has it save first), and nothing stays behind.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_reheat.processes import die_with_parent
from megatron_reheat.run_folder import RunFolder, read_metrics

ROOT = Path(__file__).resolve().parents[2]
ARMS = ("reheat", "control", "flatten", "rollout_temperature")
TABLE_WIDTH = 110


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the model's weights and of all sampling")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["reheat", "control", "flatten"])
    parser.add_argument("--steps-after", type=int, default=150, help="steps of every arm after the collapse")
    parser.add_argument("--fresh", action="store_true", help="remove this seed's earlier runs first")
    options = parser.parse_args()
    if options.steps_after < 1:
        parser.error(f"--steps-after {options.steps_after} must be at least 1")
    children.follow_signals()
    started = time.monotonic()

    folder = ROOT / "runs" / "countdown" / f"seed-{options.seed}"
    if options.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    make_inputs(folder, options.seed)
    shared = [
        f"run.folder={folder}/{{name}}",
        f"run.seed={options.seed}",
        f"model.hf_path={folder / 'model'}",
        f"data.path={folder / 'task' / 'train.jsonl'}",
        f"eval.data.path={folder / 'task' / 'eval.jsonl'}",
    ]
    if not reheat("train", "yaml/countdown_cpu.yaml", *shared):
        return 1
    trunk = [r for r in read_metrics(folder / "trunk") if "stage" in r]
    if trunk[-1].get("event") is None:
        print(
            "the trunk did not collapse within its steps; raise run.steps in yaml/countdown_cpu.yaml", file=sys.stderr
        )
        return 1
    rl_steps = sum(r["stage"] == "rlvr" for r in trunk)
    for arm in options.arms:
        steps = f"run.steps={rl_steps + options.steps_after}"
        fork = f"run.fork_from={folder / 'trunk'}"
        if not reheat("train", f"yaml/countdown_cpu_{arm}.yaml", *shared, fork, steps):
            return 1
    arms = [folder / arm for arm in options.arms]
    for arm in arms:
        if RunFolder(arm).rounds and not reheat("compare", str(arm)):
            return 1
    if not reheat("report", *map(str, arms), "--out", str(folder / "report")):
        return 1
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(results_table(trunk, arms, options.seed))
    print(f"report: {folder / 'report' / 'comparison.html'}")
    print(f"the whole demo took {(time.monotonic() - started) / 60:.1f} minutes")
    return 0


def make_inputs(folder: Path, seed: int) -> None:
    """The policy's random weights with its tokenizer, and the problems."""
    here = ROOT / "examples" / "countdown_cpu"
    if not (folder / "model" / "config.json").exists():
        run(sys.executable, here / "make_model.py", folder / "model", "--seed", seed)
    if not (folder / "task" / "eval.jsonl").exists():
        # the problems stay the same for every seed, so that seeds differ in training alone
        run(sys.executable, here / "make_task.py", folder / "task")


class Children:
    """One process at a time, in a group of its own: a terminal's Ctrl-C comes here alone, and is passed on once."""

    def __init__(self) -> None:
        self._running: subprocess.Popen[bytes] | None = None
        self._ended_by: int | None = None

    def follow_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._pass_on)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})  # which whoever started this may have left blocked

    def run(self, command: Sequence[str], **options: Any) -> int:
        """The exit status; exits as well when a signal came meanwhile."""
        die = partial(die_with_parent, os.getpid(), "demo", signal.SIGTERM)
        self._running = subprocess.Popen(command, process_group=0, preexec_fn=die, **options)
        status = self._running.wait()
        self._running = None
        if self._ended_by is not None:
            sys.exit(128 + self._ended_by)
        return status

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        if self._running is None:
            sys.exit(128 + number)
        self._ended_by = number
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._running.pid, number)


children = Children()


def reheat(*arguments: str) -> bool:
    """One `reheat` command, shown before it runs."""
    print(f"\n$ reheat {' '.join(arguments)}", flush=True)
    return children.run([sys.executable, "-m", "megatron_reheat", *arguments], cwd=ROOT) == 0


def run(*command: Any) -> None:
    status = children.run([str(c) for c in command], stderr=subprocess.DEVNULL)
    if status:
        sys.exit(f"{command[1]} failed with status {status}")


def results_table(trunk: list[dict[str, Any]], arms: list[Path], seed: int) -> Table:
    """What came out, at every stage border: held-out problems, 8 samples each, temperature 1."""
    table = Table(
        title=f"held-out countdown problems, 8 samples each, seed {seed} (95% bootstrap intervals over problems)"
    )
    for column in ("policy", "step", "avg@8", "pass@8", "entropy (nats)"):
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    add_row(table, "warm start", next(r for r in trunk if r["stage"] == "sft" and "eval/avg_at_k" in r))
    add_row(table, "collapsed by RL", trunk[-1])
    for arm in arms:
        evaluated = [r for r in read_metrics(arm) if "eval/avg_at_k" in r and r["step"] > trunk[-1]["step"]]
        for record in evaluated:
            if record["stage"] == "reheat":
                add_row(table, f"{arm.name}: after reheating round {record['round']}", record)
        add_row(table, f"{arm.name}: end", evaluated[-1])
    return table


def add_row(table: Table, label: str, record: dict[str, Any]) -> None:
    def with_interval(name: str) -> str:
        return f"{record[name]:.3f} [{record[f'{name}_low']:.3f}, {record[f'{name}_high']:.3f}]"

    table.add_row(
        label,
        str(record["step"]),
        with_interval("eval/avg_at_k"),
        with_interval("eval/pass_at_k"),
        f"{record['eval/entropy']:.3f}",
    )


if __name__ == "__main__":
    raise SystemExit(main())
