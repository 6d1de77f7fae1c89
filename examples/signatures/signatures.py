"""The seven signatures of policy reheating (arXiv 2606.00755), seed by seed, and whether they are reproduced at this size.

    python -m examples.signatures.signatures [--seeds 0 1 2] [--quick] [--jobs 2] [--table]

For each seed: a warm start, RL until the entropy collapses, and from there reheating by several teachers, beside reheating
where nothing has collapsed, and cooling. The same command again repeats nothing that is finished, and continues what was cut
off from its last checkpoint.
"""

from __future__ import annotations

from pathlib import Path

from examples.shares import parser_of, places_of, present, share_out
from examples.signatures.figure import draw
from examples.signatures.measurements import TRUNK, Measurements, Seed, Settings
from examples.signatures.verdicts import markdown

STEPS, QUICK_STEPS = 60, 4


def main() -> int:
    options = parser_of(__doc__, range(3)).parse_args()
    runs, results = places_of(options, Path(__file__))
    settings = Settings(runs, results, options.quick, QUICK_STEPS if options.quick else STEPS)
    seeds = [Seed(settings, seed) for seed in options.seeds]
    if not options.table:
        left = [seed for seed in seeds if not seed.is_done]
        share_out(left, settings.config(options.seeds[0], TRUNK, {}), options.jobs)
    found = [Measurements.read(path) for path in sorted(results.glob("seed-*.json"))]
    present(found, results, "signatures", markdown, draw)
    return 0 if options.table else int(not all(seed.is_done for seed in seeds))


if __name__ == "__main__":
    raise SystemExit(main())
