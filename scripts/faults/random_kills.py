"""Real runs, killed with SIGKILL at random moments and started again until they end, as if nothing had happened.

    python -m scripts.faults.random_kills [--kills 100] [--seed 0] [--layouts "one process" "tensor 2" "data 2"]

A run has a warm start, RL and reheating, evaluates, keeps a reference policy and the best checkpoint, and saves every other
step. Half of the kills are of runs of one process. Four of ten moments are drawn from a run's start, the others from the steps
that it has left. After six kills, and if it is faster than that, a run comes to its end, and another one begins.

Who is killed is drawn as well: every process at once, as a node's failure does, the launcher, or one rank. After each kill
nothing that the run started may live on, nothing may be left in /dev/shm, and every folder that counts as a checkpoint must be
whole. In the end the metrics (without times), the rollouts, the checkpoints' weights, optimizers and states, and the names of
all files have to equal those of an undisturbed run. Exits with 1 if anything went wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megatron_reheat.model.checkpoint import list_checkpoints, read_state, verify_checkpoint
from megatron_reheat.rewards.sandbox import adopt_orphans
from megatron_reheat.run_folder import RunFolder
from tests.e2e import runs

WATCHED = Path(__file__).parent / "watched"
LAYOUTS = {
    "one process": ("parallel.data=1",),
    "tensor 2": ("parallel.data=1", "parallel.tensor=2"),
    "data 2": ("parallel.data=2",),
}
SHARES = {"one process": 2, "tensor 2": 1, "data 2": 1}
VICTIMS = {1: ("everything", "trainer"), 2: ("everything", "launcher", "rank 0", "rank 1")}
IN_START = 0.4
KILLS_OF_A_RUN = 6
# the launcher lets the other ranks of one that died 30 s before it kills them: time to leave an import or a collective
GONE_WITHIN_S = 35.0
SHARED_MEMORY = Path("/dev/shm")
# what a killed process may leave for good: its own log, and lines that are set aside
BESIDE = ("logs", "tensorboard", "metrics.discarded.jsonl")


def make_recipe(root: Path) -> Path:
    tree = runs.recipe(runs.make_policy_folder(root / "model"), root)
    changes: dict[str, dict[str, Any]] = {
        "sft": {"steps": 2, "log_every": 1},
        # the coefficient is a state of the method
        "rl": {"method": "adaptive_entropy", "options": {"target": 3.0}, "entropy_coef": 0.01, "kl_coef": 0.01},
        "checkpoint": {"every": 2, "keep": 2, "keep_best": "eval/avg_at_k"},
        "controller": {"max_reheat_steps": 2},
        "logging": {"tensorboard": False},
        "run": {"steps": 6},
    }
    for section, keys in changes.items():
        tree[section] = {**tree[section], **keys} if section in tree else keys
    return runs.write_recipe(tree, root / "recipe.yaml")


@dataclass(frozen=True)
class Whole:
    """An undisturbed run, the seconds from its start to its first step and from there to its end."""

    folder: Path
    num_ranks: int
    num_steps: int
    start_s: float
    steps_s: float


@dataclass
class Outcomes:
    phases: Counter[str] = field(default_factory=Counter)
    victims: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    runs: int = 0
    equal: int = 0
    left: int = 0
    shared_memory: int = 0
    slowest_gone_s: float = 0.0
    wrong: list[str] = field(default_factory=list)


class Attempt:
    """`reheat train` from its start to its end or to its kill."""

    def __init__(self, recipe: Path, folder: Path, layout: Sequence[str]) -> None:
        self._watched = folder / "watched"
        shutil.rmtree(self._watched, ignore_errors=True)
        self._watched.mkdir(parents=True)
        self._output, self._errors = folder / "output", folder / "errors"
        self._shared_memory = {path.name for path in SHARED_MEMORY.iterdir()}
        path = os.pathsep.join([str(WATCHED), str(runs.ROOT)])
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "megatron_reheat",
                    "train",
                    str(recipe),
                    f"run.folder={folder}/{{name}}",
                    *layout,
                ],
                cwd=runs.ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "WATCHED": str(self._watched)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )
        self.began = time.monotonic()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def status(self) -> int | None:
        return self._process.returncode

    @property
    def steps_have_begun(self) -> bool:
        return b"first weight sync" in self._output.read_bytes()

    @property
    def errors(self) -> str:
        return self._errors.read_text(errors="replace")

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def send(self, number: signal.Signals, *, to_all: bool = False) -> None:
        """To the process that was started, or to all that there are."""
        started = psutil.Process(self._process.pid)
        for process in (*(started.children(recursive=True) if to_all else ()), started):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def kill(self, victim: str) -> str:
        """Returns who was killed: everything where the victim had not started yet."""
        launcher = psutil.Process(self._process.pid)
        found = [launcher] if victim in ("trainer", "launcher") else []
        if victim.startswith("rank"):
            found = [rank for rank in launcher.children() if _name(rank) == victim]
        if not found:
            found, victim = [launcher, *launcher.children(recursive=True)], "everything"
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return victim

    def last_calls(self) -> list[str]:
        """Where rank 0 was last, from the outermost call on; empty before it called anything of the package."""
        for name in ("rank-0", "rank-none"):
            with contextlib.suppress(OSError):
                return (self._watched / name).read_text(errors="replace").split()
        return []

    def orphaned_memory(self) -> list[str]:
        """Segments of /dev/shm that are new, that no process holds, and that stay: others may work on this machine."""
        found = self._unheld()
        if found:
            time.sleep(2.0)
        return sorted(found & self._unheld()) if found else []

    def _unheld(self) -> set[str]:
        new = {path.name for path in SHARED_MEMORY.iterdir()} - self._shared_memory
        # others name theirs by their process
        held = {name for name in new if any(psutil.pid_exists(int(pid)) for pid in re.findall(r"\d+", name))}
        for maps in Path("/proc").glob("[0-9]*/maps") if new else ():
            with contextlib.suppress(OSError):
                held |= {name for name in new if f"{SHARED_MEMORY}/{name}\n" in maps.read_text()}
        return new - held


def _name(process: psutil.Process) -> str | None:
    with contextlib.suppress(psutil.Error):
        return process.name()
    return None


PARTS = {
    "_save": "save",
    "_finish_save": "save",
    "evaluate": "evaluation",
    "publish": "weight sync",
    "update": "update",
}
PARTS |= {"score": "scoring", **dict.fromkeys(("sample", "collect", "grade"), "rollout")}


def phase_of(calls: Sequence[str]) -> str:
    """What a run was doing, told by the calls that lead to where it was."""
    functions = [call.partition(":")[2] for call in calls]
    if "stages/run:go" not in calls:
        return "start-up: " + ("imports, data" if "stages/run:_train" not in calls else "engine, model")
    if "_restore" in functions:
        return "start-up: " + ("weight sync" if "publish" in functions else "load")
    stage = next((call.removeprefix("stages/").partition(":")[0] for call in calls if call in STEPS), "")
    part = next((PARTS[name] for name in functions if name in PARTS), "the rest")
    return f"{STAGES[stage]}: {part}" if stage else part


STAGES = {"sft": "warm start", "rlvr": "RL", "reheat": "reheating"}
STEPS = {f"stages/{stage}:step" for stage in STAGES}


# -- what is left --------------------------------------------------------------------------------------------------------


def living() -> list[psutil.Process]:
    """Of all that runs have started: whoever loses its parent becomes a child of this process (`adopt_orphans`)."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_until_gone() -> tuple[int, float]:
    """How many processes live on, which are then killed, and the seconds that the others took."""
    began = time.monotonic()
    while (left := living()) and time.monotonic() - began < GONE_WITHIN_S:
        time.sleep(0.02)
    took = time.monotonic() - began
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            print(f"left: {process.pid} {' '.join(process.cmdline())[:200]}", flush=True)
            process.kill()
    return len(left), took


def reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


# -- what it comes to ----------------------------------------------------------------------------------------------------


def damaged(folder: Path) -> Iterator[str]:
    """Of a run that was killed: whatever counts as a checkpoint must be whole."""
    checkpoints = folder / "checkpoints"
    for checkpoint in list_checkpoints(checkpoints):
        if problem := verify_checkpoint(checkpoint):
            yield problem
    for pointer in ("latest", "best"):
        path = checkpoints / pointer
        if path.exists() and not (checkpoints / path.read_text()).is_dir():
            yield f"{path} names {path.read_text()!r}, which is not there"


def differences(whole: Path, other: Path) -> Iterator[str]:
    """Between two runs that came to their end, except for times."""
    if files(whole) != files(other):
        yield f"other files: {sorted(map(str, files(whole) ^ files(other)))}"
        return
    steps, expected = ([runs.numbers_of(s) for s in runs.steps_of(folder)] for folder in (other, whole))
    if steps != expected:
        yield f"other metrics: {next((pair for pair in zip(steps, expected, strict=False) if pair[0] != pair[1]), 'lines')}"
    for name in sorted(files(whole)):
        path = whole / name
        if name.parts[0] in ("rollouts", "reference") or name.name in ("latest", "best"):
            if path.read_bytes() != (other / name).read_bytes():
                yield f"{name} differs"
        elif name.name == "state.json":
            pair = [checkpoint.parent for checkpoint in (path, other / name)]
            if read_state(pair[0]) != read_state(pair[1]):
                yield f"{name} differs"
            contents, expected_contents = (contents_of(checkpoint) for checkpoint in reversed(pair))
            if unequal := sorted(
                key
                for key in contents.keys() | expected_contents.keys()
                if not is_same(contents.get(key), expected_contents.get(key))
            ):
                yield f"{name.parent}: {', '.join(unequal[:3])} and so on: {len(unequal)} entries differ"


def files(folder: Path) -> set[Path]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return {path for path in found if path.parts[0] not in BESIDE}


def contents_of(checkpoint: Path) -> dict[str, Any]:
    """Every tensor and object in it, by its name."""
    with tempfile.NamedTemporaryFile() as file:
        dcp_to_torch_save(checkpoint, file.name)
        contents: dict[str, Any] = torch.load(file.name, weights_only=False)
    common = checkpoint / "common.pt"  # which Megatron-Core 0.19 keeps among the others
    return {**contents, **({common.name: torch.load(common, weights_only=False)} if common.exists() else {})}


def is_same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    return type(one) is type(other) and (isinstance(one, bytes) or repr(one) == repr(other))


# -- the kills -----------------------------------------------------------------------------------------------------------


def undisturbed(recipe: Path, folder: Path, layout: Sequence[str]) -> Whole:
    """
    Raises:
        RuntimeError: it fails.
    """
    attempt = Attempt(recipe, folder, layout)
    while not attempt.steps_have_begun and not attempt.ended:
        time.sleep(0.02)
    start_s = time.monotonic() - attempt.began
    attempt.wait(runs.LIMIT_S)
    if attempt.status != 0:
        raise RuntimeError(f"the undisturbed run failed: {attempt.errors}")
    steps = runs.steps_of(folder / "run")
    num_ranks = 1 if layout == LAYOUTS["one process"] else 2
    steps_s = time.monotonic() - attempt.began - start_s
    whole = Whole(folder / "run", num_ranks, steps[-1]["step"], start_s, steps_s)
    stages = [step["stage"] for step in steps]
    if not {"sft", "rlvr", "reheat"} <= set(stages) or stages[-1] != "rlvr":
        raise RuntimeError(f"the undisturbed run has not gone through every stage and back: {stages}")
    return whole


def kill_at_random(attempt: Attempt, folder: Path, whole: Whole, rng: random.Random, outcomes: Outcomes) -> bool:
    """Kills the run in `folder`; returns whether it came to its end before."""
    in_start, part, victim = rng.random() < IN_START, rng.random(), rng.choice(VICTIMS[whole.num_ranks])
    if not in_start:
        while not attempt.steps_have_begun and not attempt.ended:
            time.sleep(0.02)
        part *= 1 - (RunFolder(folder / "run").saved_step or 0) / whole.num_steps
    attempt.wait(part * (whole.start_s if in_start else whole.steps_s))
    if attempt.ended:
        return True
    victim = attempt.kill(victim)
    left, took = wait_until_gone()
    attempt.wait(GONE_WITHIN_S)
    reap()
    phase, memory = phase_of(attempt.last_calls()), attempt.orphaned_memory()
    outcomes.kills += 1
    outcomes.phases[phase] += 1
    outcomes.victims[victim] += 1
    outcomes.left += left
    outcomes.shared_memory += len(memory)
    outcomes.slowest_gone_s = max(outcomes.slowest_gone_s, took)
    wrong = [*damaged(folder / "run"), *(f"left: {SHARED_MEMORY}/{name}" for name in memory)]
    if victim.startswith("rank") and (attempt.status != 1 or attempt.errors.count("error:") != 1):
        wrong.append(f"{victim} was killed, status {attempt.status}: {attempt.errors[-500:]}")
    elif "Traceback" in attempt.errors:
        wrong.append(f"{victim} was killed, a traceback: {attempt.errors[-1500:]}")
    outcomes.wrong += [f"{folder}: {text}" for text in wrong]
    print(f"{folder.name}: {victim} killed, {phase}; gone after {took:.2f} s", *wrong, sep="\n  ", flush=True)
    return False


def kill_a_run(
    name: str, kills: int, whole: Whole, rng: random.Random, recipe: Path, root: Path, own: Outcomes
) -> None:
    """Kills one run up to so many times, and compares what it comes to with the undisturbed one."""
    own.runs += 1
    folder, until, ended = root / f"{name}, run {own.runs}", own.kills + kills, False
    while not ended:
        attempt = Attempt(recipe, folder, LAYOUTS[name])
        if own.kills < until:
            ended = kill_at_random(attempt, folder, whole, rng, own)
        else:
            attempt.wait(runs.LIMIT_S)
            ended = True
    wrong = list(differences(whole.folder, folder / "run"))
    if attempt.status != 0:
        wrong = [f"ended with {attempt.status}: {attempt.errors[-500:]}"]
    print(f"{folder.name}: came to its end,", "; ".join(wrong) or "equal to the bit", flush=True)
    own.equal += not wrong
    own.wrong += [f"{folder}: {text}" for text in wrong]
    if not wrong:
        shutil.rmtree(folder)


def share_out(kills: int, layouts: Sequence[str]) -> dict[str, int]:
    """How many of them are of which layout, where any are."""
    total, given = sum(SHARES[name] for name in layouts), 0.0
    planned = {}
    for name in layouts:
        planned[name] = round(given + kills * SHARES[name] / total) - round(given)
        given += kills * SHARES[name] / total
    return {name: count for name, count in planned.items() if count}


def print_tables(outcomes: dict[str, Outcomes]) -> None:
    for title, attribute in (("killed", "victims"), ("in the middle of", "phases")):
        counts: dict[str, Counter[str]] = {name: getattr(own, attribute) for name, own in outcomes.items()}
        print(f"\n{title:28}" + "".join(f"{name:>13}" for name in counts) + f"{'all':>6}")
        for row in sorted({row for own in counts.values() for row in own}):
            numbers = [own[row] for own in counts.values()]
            print(f"{row:28}" + "".join(f"{number:13}" for number in numbers) + f"{sum(numbers):6}")
    print(f"\n{'':28}" + "".join(f"{name:>13}" for name in outcomes) + f"{'all':>6}")
    for title, name in {
        "kills": "kills",
        "runs that came to their end": "runs",
        "equal to the bit": "equal",
        "processes left": "left",
        "segments left in /dev/shm": "shared_memory",
    }.items():
        numbers = [getattr(own, name) for own in outcomes.values()]
        print(f"{title:28}" + "".join(f"{number:13}" for number in numbers) + f"{sum(numbers):6}")
    slowest = max(own.slowest_gone_s for own in outcomes.values())
    print(f"all processes of a run were gone {slowest:.2f} s after its kill at the latest")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--keep", type=Path, help="an empty folder for the runs, where those that differ stay")
    parsed = parser.parse_args(arguments)
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    outcomes = {name: Outcomes() for name in parsed.layouts}
    planned = share_out(parsed.kills, parsed.layouts)
    with tempfile.TemporaryDirectory() as temporary:
        root = parsed.keep or Path(temporary)
        root.mkdir(exist_ok=True)
        recipe = make_recipe(root)
        try:
            wholes = {}
            for name in planned:
                wholes[name] = whole = undisturbed(recipe, root / f"{name}, undisturbed", LAYOUTS[name])
                print(f"{name}: {whole.start_s:.1f} s to the first step, {whole.steps_s:.1f} s to the end", flush=True)
            rngs = {name: random.Random(f"{parsed.seed} {name}") for name in planned}
            # in turns, so that one that is interrupted has met all of them
            while left := {name: n - outcomes[name].kills for name, n in planned.items() if outcomes[name].kills < n}:
                name = max(left, key=lambda name: left[name] / planned[name])
                kills = min(left[name], KILLS_OF_A_RUN)
                kill_a_run(name, kills, wholes[name], rngs[name], recipe, root, outcomes[name])
        finally:  # of one that is interrupted, too
            wait_until_gone()
            for own in outcomes.values():
                print(*(f"WRONG {text}" for text in own.wrong), sep="\n")
            print_tables(outcomes)
    return 1 if any(own.wrong or own.left or own.shared_memory for own in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
