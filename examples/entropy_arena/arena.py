"""Every method on the same task from the same warm start, each alone and with reheating: who keeps the entropy, at what price?

    python -m examples.entropy_arena.arena [--methods grpo rlrt] [--seeds 0 1 2] [--steps 200] [--quick] [--jobs 2] [--table]

A warm start is trained once for each seed; all runs of that seed fork from it. Runs are dealt out to `--jobs` processes, one on
each core, in which they take turns on one vLLM engine. The same command again repeats nothing that is finished, and continues
what was cut off from its last checkpoint. A run that fails is on record as such, and the others go on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.countdown_cpu.demo import make_inputs
from examples.countdown_cpu.make_model import make_model, make_tokenizer
from examples.elsewhere import Sections, moved
from examples.entropy_arena.recipes import CONTESTANTS, RECIPES
from examples.entropy_arena.results import Result, draw, effect_of_reheating, markdown, measured, read_all
from examples.shares import parser_of, places_of, present, share_out
from megatron_reheat.commands.convert import to_hf
from megatron_reheat.config import Config
from megatron_reheat.recipe import merged
from megatron_reheat.run_folder import RunFolder, read_metrics
from megatron_reheat.stages.series import RunSeries

TRUNK, EXPLORER_TRUNK = "trunk", "explorer-trunk"
STARTS = {
    TRUNK: "model",
    EXPLORER_TRUNK: "explorer-start",
}  # warm starts by name: the random weights that they begin with
EXPLORER_SEED = 1000  # more than that of the policy, whose weights are others
# one core a process, so one replica and half of the demo's batch; a checkpoint every half minute or so. Reheating begins
# earlier than in the demo: a method has a few hundred steps in all.
ALWAYS: Sections = {
    "parallel": {"data": 1},
    "rl": {"prompts_per_step": 32},
    "controller": {"collapse_below": 0.22, "reheat_to": 0.27},
    "reward": {"timeout_s": 30},  # a verifier shares its core with trainer and engine
    "checkpoint": {"every": 50, "keep": 1},
    "logging": {"console": False, "tensorboard": False, "rollouts_per_step": 0},
}
# everything happens within minutes, and nothing is learnt from it
QUICK: Sections = {
    "sft": {"steps": 150, "batch_size": 128, "warmup_steps": 10},
    "rl": {"prompts_per_step": 16, "group_size": 4, "minibatch_prompts": None},
    "reheat": {"prompts_per_step": 32},
    "controller": {
        "collapse_below": 5.0, "reheat_to": 6.0, "runaway_entropy": 9.0, "runaway_jump": 9.0, "smoothing_steps": 2,
        "max_reheat_steps": 1, "cooldown_steps": 90,
    },
    "eval": {"num_samples": 4},
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """`runs` is where runs and warm starts lie, `results` where what is worth keeping goes."""

    runs: Path
    results: Path
    steps: int
    quick: bool

    def place(self, seed: int) -> Path:
        return self.runs / f"seed-{seed}"

    def config(self, name: str, seed: int, sections: Sections) -> Config:
        """A recipe for one seed; `sections` come last."""
        quick = (QUICK,) if self.quick else ()
        return moved(RECIPES[name], self.place(seed), ALWAYS, *quick, {"run": {"seed": seed}}, sections)

    @property
    def first(self) -> Config:
        """What the engines of all runs are started by."""
        return self.config("grpo", 0, {})


@dataclass(frozen=True)
class WarmStart:
    """What a seed's runs fork from, or what the model that a method samples from besides is made of."""

    settings: Settings
    seed: int
    name: str = TRUNK

    @property
    def config(self) -> Config:
        model = self.settings.place(self.seed) / STARTS[self.name]
        return self.settings.config(
            "grpo", self.seed, {"model": {"hf_path": str(model)}, "run": {"name": self.name, "steps": 0}}
        )

    @property
    def is_trained(self) -> bool:
        return RunFolder(self.config.run.path).saved_step == self.config.total_steps

    def do(self, series: RunSeries) -> str:
        series.train(self.config)
        return f"seed {self.seed}: {self.name} is trained"

    def failed(self, error: Exception) -> None:
        """Nothing that starts from it is begun (`compete`)."""


@dataclass(frozen=True)
class Contest:
    """One method, alone or with reheating, from one seed's warm start."""

    settings: Settings
    method: str
    reheat: bool
    seed: int

    @property
    def config(self) -> Config:
        settings = self.settings
        run = {
            "name": Path(self.result().file).stem,
            "steps": settings.steps,
            "fork_from": str(settings.place(self.seed) / TRUNK),
        }
        recipe, sections = CONTESTANTS[self.method]
        action = "reheat" if self.reheat else "none"
        sections = merged(sections, {"run": run, "controller": {"action": action}})
        if recipe == "sdpg":  # the recipe's ramps, for as many steps
            rise = settings.steps // 8
            sections = merged(
                sections, {"rl": {"options": {"warmup_steps": rise, "decay_steps": settings.steps - rise}}}
            )
        return settings.config(recipe, self.seed, sections)

    def do(self, series: RunSeries) -> str:
        """Writes the result."""
        config = self.config
        series.train(config)
        records = [r for r in read_metrics(config.run.path) if "stage" in r and r["step"] > config.sft.steps]
        result = measured(records, self.result(k=config.eval.num_samples))
        result.write(self.settings.results)
        return f"{result.file}: avg {result.avg:.3f}, pass {result.pass_:.3f}, entropy {result.entropy:.3f}"

    def failed(self, error: Exception) -> None:
        self.result(error=f"{type(error).__name__}: {error}").write(self.settings.results)

    def result(self, **known: Any) -> Result:
        """With nothing measured yet."""
        return Result(self.method, self.reheat, self.seed, self.settings.steps, **known)

    @property
    def is_done(self) -> bool:
        """Failures are tried again.

        Raises:
            SystemExit: the result is of another number of steps.
        """
        path, steps = self.settings.results / self.result().file, self.settings.steps
        if not path.exists():
            return False
        result = Result.read(path)
        if result.steps != steps:
            sys.exit(f"{path} is of {result.steps} steps, not {steps}; give other --results and --runs folders")
        return result.error is None


def main() -> int:
    parser = parser_of(__doc__, range(3))
    parser.add_argument("--methods", nargs="+", choices=sorted(CONTESTANTS), default=sorted(CONTESTANTS))
    parser.add_argument("--steps", type=int, default=None, help="after the warm start; 200, with --quick 6")
    options = parser.parse_args()
    runs, results = places_of(options, Path(__file__))
    settings = Settings(runs, results, options.steps or (6 if options.quick else 200), options.quick)
    if not options.table:
        contests = [Contest(settings, m, r, s) for s in options.seeds for m in options.methods for r in (False, True)]
        compete(contests, settings, options.jobs)
    found = read_all(results)
    present(found, results, "arena", lambda all_: f"{markdown(all_)}\n{effect_of_reheating(all_)}", draw)
    return int(any(r.error for r in found))


def compete(contests: Sequence[Contest], settings: Settings, jobs: int) -> None:
    """Everything that is not done yet, warm starts first."""
    left = [contest for contest in contests if not contest.is_done]
    seeds = sorted({contest.seed for contest in left})
    asking = sorted({c.seed for c in left if c.config.rl.samplers})
    for seed in seeds:
        make_inputs(settings.place(seed), seed)
    for seed in asking:
        start = settings.place(seed) / STARTS[EXPLORER_TRUNK]
        make_model(EXPLORER_SEED + seed).save_pretrained(start)
        make_tokenizer().save_pretrained(start)
    starts = [WarmStart(settings, seed) for seed in seeds]
    starts += [WarmStart(settings, seed, EXPLORER_TRUNK) for seed in asking]
    untrained = [start for start in starts if not start.is_trained]
    if jobs == 1 and not asking:
        share_out([*untrained, *left], settings.first, jobs)  # one after the other anyway, on one engine
        return
    share_out(untrained, settings.first, jobs)
    if missing := [start for start in starts if not start.is_trained]:
        sys.exit(f"{missing[0].name} of seed {missing[0].seed} failed, and with it all that starts from it")
    for seed in asking:
        if not (explorer := settings.place(seed) / "explorer").exists():
            to_hf(settings.place(seed) / EXPLORER_TRUNK, explorer)
    share_out(left, settings.first, jobs)


if __name__ == "__main__":
    raise SystemExit(main())
