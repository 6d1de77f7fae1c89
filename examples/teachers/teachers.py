"""What a frozen teacher saves: collapsed policies, reheated by several teachers to the same entropy, beside exact flattening.

    python -m examples.teachers.teachers [--seeds 2 3 4 5] [--quick] [--jobs 2] [--table]

For each seed: a warm start, RL until the entropy collapses (those of examples.signatures, with the same --runs), and from there
every arm for as many steps. The same command again repeats nothing that is finished, and continues what was cut off. README.md
says which figure counts, written before the runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from examples.countdown_cpu.demo import make_inputs
from examples.elsewhere import Sections
from examples.shares import parser_of, places_of, present, share_out
from examples.signatures.measurements import TRUNK, Score, SeedRuns, Settings
from examples.stalled.stalled import make_problems
from examples.teachers.results import CONTROL, FLATTEN, Outcome, draw, markdown
from megatron_reheat.stages.series import RunSeries

HELD_OUT, QUICK_HELD_OUT = 512, 64
STEPS, QUICK_STEPS = 120, 4  # of an arm, reheating included
MAX_REHEAT_STEPS = 80
ARMS: dict[str, Sections] = {
    CONTROL: {"controller": {"action": "none"}},
    FLATTEN: {"controller": {"action": "flatten"}},
    "current-1.2": {"reheat": {"teacher": "current", "teacher_temperature": 1.2}},
    "current-1.5": {"reheat": {"teacher": "current", "teacher_temperature": 1.5}},
    "frozen-1.5": {"reheat": {"teacher": "frozen", "teacher_temperature": 1.5}},
}


@dataclass(frozen=True)
class Trial:
    """One seed: a task of `examples.shares`."""

    settings: Settings
    seed: int

    @property
    def is_done(self) -> bool:
        return all((self.settings.results / Outcome.file(name, self.seed)).exists() for name in ARMS)

    def do(self, series: RunSeries) -> str:
        settings, seed = self.settings, self.seed
        make_problems(settings.place(seed), seed, QUICK_HELD_OUT if settings.quick else HELD_OUT)
        make_inputs(settings.place(seed), seed)
        runs = SeedRuns(settings, seed, series)
        collapsed = Score.of(runs.collapse())
        for name, sections in ARMS.items():
            if (settings.results / Outcome.file(name, seed)).exists():
                continue
            forked = runs.forked(settings.steps, {"max_reheat_steps": MAX_REHEAT_STEPS, "max_rounds": 1})
            records = runs.run(name, forked, eval={"every": 0}, **sections)
            Outcome.of(name, seed, collapsed, records).write(settings.results)
        return f"seed {seed} is done"

    def failed(self, error: Exception) -> None:
        """The same command tries it again."""


def main() -> int:
    options = parser_of(__doc__, range(2, 6)).parse_args()
    runs, results = places_of(options, Path(__file__))
    settings = Settings(runs, results, options.quick, QUICK_STEPS if options.quick else STEPS)
    trials = [Trial(settings, seed) for seed in options.seeds]
    if not options.table:
        left = [trial for trial in trials if not trial.is_done]
        share_out(left, settings.config(options.seeds[0], TRUNK, {}), options.jobs)
    outcomes = [Outcome.read(path) for path in sorted(results.glob("seed-*/*.json"))]
    present(outcomes, results, "teachers", markdown, draw)
    return 0 if options.table else int(not all(trial.is_done for trial in trials))


if __name__ == "__main__":
    raise SystemExit(main())
