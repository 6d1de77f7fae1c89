"""Where RL has stalled after a collapse, what makes it move again? Every remedy from the same policies, step for step.

    python -m examples.stalled.stalled [--seeds 0 1 2 3 4 5] [--arms control reheat-forward ...] [--quick] [--jobs 2] [--table]

For each seed: a warm start, then RL on few problems until training reward stands still; from that checkpoint every arm goes
on for as many steps. The same command again repeats nothing that is finished, and continues what was cut off. README.md says
which figure counts, written before the runs.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from examples.countdown_cpu.demo import make_inputs
from examples.elsewhere import ROOT, Sections, moved
from examples.shares import parser_of, places_of, present, share_out
from examples.stalled.results import CONTROL, Outcome, Stall, draw, markdown
from megatron_reheat.commands.convert import to_hf
from megatron_reheat.config import Config
from megatron_reheat.run_folder import RunFolder, read_segments
from megatron_reheat.stages.series import RunSeries

RECIPE = ROOT / "yaml" / "countdown_cpu.yaml"
TRAIN_PROBLEMS = 1000
HELD_OUT, QUICK_HELD_OUT = 512, 64
STALL_STEPS, ARM_STEPS = 500, 150
QUICK_STALL_STEPS, QUICK_ARM_STEPS = 4, 10
ALWAYS: Sections = {
    "parallel": {"data": 1},
    "rl": {"prompts_per_step": 32},
    "reward": {"timeout_s": 30},  # a verifier shares its core with trainer and engine
    # the entropy is about 0.1 nats by then: whoever acts on a collapse acts at once, and once
    "controller": {"action": "none", "collapse_below": 0.19, "reheat_to": 0.2, "max_reheat_steps": 60, "max_rounds": 1},
    "reheat": {"lr": 2e-5},
    "checkpoint": {"every": 50, "keep": 1},
    "logging": {"console": False, "tensorboard": False, "rollouts_per_step": 0},
}
QUICK: Sections = {
    "sft": {"steps": 40, "batch_size": 128, "warmup_steps": 10},
    "rl": {"prompts_per_step": 16, "group_size": 4},
    "reheat": {"prompts_per_step": 32},
    "controller": {
        "collapse_below": 5.0, "reheat_to": 6.0, "runaway_entropy": 9.0, "smoothing_steps": 2, "max_reheat_steps": 2,
    },
    "eval": {"num_samples": 2},
}  # fmt: skip
# by name, what an arm changes. Clip-higher is not among them: with one update a step no ratio leaves 1, and no bound acts.
ARMS: dict[str, Sections] = {
    CONTROL: {},
    "reheat-forward": {"controller": {"action": "reheat"}, "reheat": {"direction": "forward"}},
    "reheat-reverse": {"controller": {"action": "reheat"}, "reheat": {"direction": "reverse"}},
    "flatten": {"controller": {"action": "flatten"}},
    "rollout-temperature": {"controller": {"action": "rollout_temperature", "rollout_temperature": 1.2}},
    "entropy-bonus": {"rl": {"entropy_coef": 0.01}},
}


@dataclass(frozen=True)
class Settings:
    """`runs` is where runs lie, `results` where what is worth keeping goes."""

    runs: Path
    results: Path
    quick: bool

    @property
    def stall_steps(self) -> int:
        return QUICK_STALL_STEPS if self.quick else STALL_STEPS

    @property
    def arm_steps(self) -> int:
        return QUICK_ARM_STEPS if self.quick else ARM_STEPS

    def place(self, seed: int) -> Path:
        return self.runs / f"seed-{seed}"

    def warm(self, seed: int) -> Config:
        """Imitation of solved problems, of which there are many."""
        return self._config(seed, {"run": {"name": "warm", "steps": 0}})

    def stalled(self, seed: int) -> Config:
        """RL on few of them."""
        return self._config(seed, self._few(seed), {"run": {"name": "stalled", "steps": self.stall_steps}})

    def arm(self, seed: int, name: str) -> Config:
        """The same RL from where that stands."""
        steps, fork = self.stall_steps + self.arm_steps, str(self.place(seed) / "stalled")
        run: Sections = {"run": {"name": name, "steps": steps, "fork_from": fork}}
        return self._config(seed, self._few(seed), run, ARMS[name])

    def _few(self, seed: int) -> Sections:
        place = self.place(seed)
        return {
            "model": {"hf_path": str(place / "warm-hf")},
            "data": {"path": str(place / "task" / "few.jsonl")},
            "sft": {"steps": 0},
        }

    def _config(self, seed: int, *sections: Sections) -> Config:
        quick = (QUICK,) if self.quick else ()
        return moved(RECIPE, self.place(seed), ALWAYS, *quick, {"run": {"seed": seed}}, *sections)


@dataclass(frozen=True)
class Trial:
    """One seed, all its arms: a task of `examples.shares`."""

    settings: Settings
    seed: int
    arms: tuple[str, ...]

    @property
    def is_done(self) -> bool:
        return (self.settings.results / Stall.file(self.seed)).exists() and not self._left()

    def do(self, series: RunSeries) -> str:
        settings, seed, place = self.settings, self.seed, self.settings.place(self.seed)
        make_problems(place, seed, QUICK_HELD_OUT if settings.quick else HELD_OUT)
        _train(series, settings.warm(seed))
        if not (place / "warm-hf").exists():
            to_hf(place / "warm", place / "warm-hf", verify=False)
        stalled = settings.stalled(seed)
        Stall.of(seed, stalled.eval.num_samples, _train(series, stalled)).write(settings.results)
        for name in self._left():
            config = settings.arm(seed, name)
            Outcome.of(name, seed, settings.arm_steps, _train(series, config)).write(settings.results)
        return f"seed {seed} is done"

    def failed(self, error: Exception) -> None:
        """The same command tries it again."""

    def _left(self) -> list[str]:
        return [name for name in self.arms if not (self.settings.results / Outcome.file(name, self.seed)).exists()]


def make_problems(place: Path, seed: int, held_out: int) -> None:
    """The demo's, with more held out, and few to do RL on."""
    if not (place / "task" / "eval.jsonl").exists():
        command = [
            sys.executable,
            "-m",
            "examples.countdown_cpu.make_task",
            str(place / "task"),
            "--eval",
            str(held_out),
        ]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    make_inputs(place, seed)
    lines = (place / "task" / "train.jsonl").read_text().splitlines(keepends=True)
    (place / "task" / "few.jsonl").write_text("".join(lines[:TRAIN_PROBLEMS]))


def _train(series: RunSeries, config: Config) -> list[dict[str, float]]:
    """To its end, unless it is there; returns the steps of the run's own."""
    if RunFolder(config.run.path).saved_step != config.total_steps:
        series.train(config)
    return [r for r in read_segments(config.run.path)[-1].records if "stage" in r]


def main() -> int:
    parser = parser_of(__doc__, range(6))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    options = parser.parse_args()
    settings = Settings(*places_of(options, Path(__file__)), options.quick)
    trials = [Trial(settings, seed, tuple(options.arms)) for seed in options.seeds]
    if not options.table:
        share_out([trial for trial in trials if not trial.is_done], settings.warm(options.seeds[0]), options.jobs)
    stalls = [Stall.read(path) for path in sorted(settings.results.glob("seed-*/stall.json"))]
    outcomes = [Outcome.read(path) for path in sorted(settings.results.glob("seed-*/arm-*.json"))]
    present(outcomes, settings.results, "stalled", partial(markdown, stalls), partial(draw, stalls))
    return 0 if options.table else int(not all(trial.is_done for trial in trials))


if __name__ == "__main__":
    raise SystemExit(main())
