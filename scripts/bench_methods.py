"""What each method's RL step takes beside GRPO's, on this machine with the countdown demo.

    python -m scripts.bench_methods [--rounds 15] [--layers 3] [--width 96] [--methods rlrt sdpg]

All registered methods with a recipe in yaml/methods train in one process on the same engine, a step each in every round, in an
order that changes, from the same warm start at a learning rate of almost nothing: the policy samples the same responses for all
of them. A ratio is the median over rounds of the step's seconds by those of GRPO in the same round. The row `grpo again` is a
second GRPO, so what it is off by is noise; `oisd_think` is `oisd` without its attention's term. Steps have one update; kl_cov,
which has nothing to penalise in one, has two, as has the GRPO that it is compared with.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from examples.countdown_cpu.make_model import make_model, make_tokenizer
from examples.elsewhere import Sections, moved
from examples.entropy_arena.recipes import RECIPES
from megatron_reheat.commands.convert import to_hf
from megatron_reheat.config import Config
from megatron_reheat.recipe import dump_config
from megatron_reheat.stages.run import Run
from megatron_reheat.stages.series import RunSeries
from megatron_reheat.types import At

AGAIN, TWICE = "grpo again", "grpo, 2 updates"
COMPARED_WITH_TWICE = ("kl_cov",)
WARM_UP_ROUNDS = 2
QUIET: Sections = {
    "parallel": {"data": 1},
    "eval": {"data": None},
    "logging": {"console": False, "tensorboard": False, "rollouts_per_step": 0},
}
PHASES = ("rollout", "score", "update")
COLUMNS = ("step", *PHASES)
# method: (what, at most this many times GRPO's)
TARGETS = {
    **dict.fromkeys(("opefo", "avspo", "clip_cov", "kl_cov", "gspo", "cispo", "sapo", "dppo"), ("step", 1.02)),
    "sdpg": ("update", 1.35),
    "oisd_think": ("update", 1.15),
}
# by name: the recipe, and what is changed in it
MEASURED: dict[str, tuple[str, Sections]] = {
    **{name: (name, {}) for name in RECIPES},
    "oisd_think": ("oisd", {"rl": {"options": {"attention_coef": 0.0}}}),
}


class Figures(NamedTuple):
    """Of one method: milliseconds of its steps, and their ratios to those of GRPO in the same rounds, by column."""

    ms: dict[str, float]
    ratio: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="steps of each method that count")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--warm-start", type=int, default=200, help="steps of imitation before")
    parser.add_argument("--methods", nargs="+", choices=sorted(MEASURED), default=sorted(MEASURED))
    options = parser.parse_args()
    console = Console()
    console.width = max(console.width, 110)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_policy(place, options.layers, options.width, options.warm_start)
        names = ["grpo", *(name for name in options.methods if name != "grpo"), AGAIN]
        if any(name in COMPARED_WITH_TWICE for name in names):
            names.append(TWICE)
        before = os.getloadavg()
        figures = measure({name: config_of(name, place) for name in names}, options.rounds)
    console.print(table(figures, options.rounds))
    console.print(f"load average {before[0]:.1f} before and {os.getloadavg()[0]:.1f} after, on {os.cpu_count()} cores")


def make_policy(place: Path, layers: int, width: int, steps: int) -> None:
    """The warm start, in the place of the model, so that right and wrong answers are mixed."""
    make_model(0, layers=layers, width=width).save_pretrained(place / "start")
    make_tokenizer().save_pretrained(place / "start")
    subprocess.run(
        [sys.executable, "-m", "examples.countdown_cpu.make_task", str(place / "task")],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    start: Sections = {
        "model": {"hf_path": str(place / "start")},
        "sft": {"steps": steps},
        "run": {"name": "trunk", "steps": 0},
    }
    recipe = place / "trunk.yaml"
    recipe.write_text(dump_config(moved(RECIPES["grpo"], place, QUIET, start)))
    subprocess.run(
        [sys.executable, "-m", "megatron_reheat", "train", str(recipe)], check=True, stdout=subprocess.DEVNULL
    )
    for name in ("model", "explorer"):  # a frozen model to sample from is a copy here
        to_hf(place / "trunk", place / name)


def config_of(name: str, place: Path) -> Config:
    """The method's recipe with batches like all the others', for a policy that stays as it is."""
    name_of_recipe, changes = MEASURED["grpo" if name in (AGAIN, TWICE) else name]
    recipe = RECIPES[name_of_recipe]
    prompts = moved(recipe, place).rl.prompts_per_step
    minibatch = prompts // 2 if name in (*COMPARED_WITH_TWICE, TWICE) else None
    same: Sections = {"rl": {"minibatch_prompts": minibatch}, "optimizer": {"lr": 1e-12}, "sft": {"steps": 0}}
    return moved(recipe, place, QUIET, changes, same, {"run": {"name": name}})


def measure(configs: dict[str, Config], rounds: int) -> dict[str, Figures]:
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in configs}
    order = list(configs)
    with RunSeries(configs["grpo"]) as series, ExitStack() as stack:
        made = {name: stack.enter_context(series.run(config)) for name, config in configs.items()}
        for run in made.values():
            for frozen in run.frozen.values():
                frozen.publish(0)
            if run.reference is not None:
                run.reference.begin(keep=False)
        for k in range(WARM_UP_ROUNDS + rounds):
            random.Random(k).shuffle(order)
            for name in order:
                taken[name].append(step(made[name], k + 1))
    counted = {name: steps[WARM_UP_ROUNDS:] for name, steps in taken.items()}
    return {
        name: figures(steps, counted[TWICE if name in COMPARED_WITH_TWICE else "grpo"])
        for name, steps in counted.items()
    }


def step(run: Run, number: int) -> dict[str, float]:
    """Seconds of one RL step by column; giving the engine this run's weights back does not count."""
    run.policy.publish(number)
    outcome, _ = run.stages["rlvr"].step(
        At(step=number, rl_step=number, stage_step=number, temperature=1.0, seed=number)
    )
    return {column: outcome.metrics[f"time/{column}_s"] for column in COLUMNS}


def figures(own: list[dict[str, float]], grpo: list[dict[str, float]]) -> Figures:
    ms = {column: 1e3 * statistics.median(s[column] for s in own) for column in COLUMNS}
    pairs = list(zip(own, grpo, strict=True))
    return Figures(ms, {column: statistics.median(s[column] / g[column] for s, g in pairs) for column in COLUMNS})


def table(rows: dict[str, Figures], rounds: int) -> Table:
    made = Table(
        title=f"an RL step of the countdown demo, medians of {rounds} rounds; ratios to GRPO's in the same round"
    )
    for column in ("method", *(f"{column}, ms" for column in COLUMNS), "target"):
        made.add_column(column, justify="left" if column == "method" else "right")
    for name, row in rows.items():
        cells = [f"{row.ms[column]:.0f} ({row.ratio[column]:.2f}x)" for column in COLUMNS]
        made.add_row(name, *cells, verdict(name, row, rows[AGAIN]))
    return made


def verdict(name: str, row: Figures, again: Figures) -> str:
    """There is none where a second GRPO is off by more than the target allows."""
    if name not in TARGETS:
        return ""
    column, limit = TARGETS[name]
    if abs(again.ratio[column] - 1) > limit - 1:
        return f"{column} <= {limit}x: too noisy to tell"
    return f"{column} <= {limit}x: {'ok' if row.ratio[column] <= limit else 'MISSED'}"


if __name__ == "__main__":
    main()
