"""The seven signatures of policy reheating (arXiv 2606.00755), seed by seed, and whether they are reproduced at this size.

    python -m examples.signatures.signatures [--seeds 0 1 2] [--quick] [--jobs 2] [--table]

For each seed: a warm start, RL until the entropy collapses, and from there reheating by several teachers, beside reheating
where nothing has collapsed, and cooling. The same command again repeats nothing that is finished, and continues what was cut
off from its last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from examples.elsewhere import ROOT
from examples.shares import share_out
from examples.signatures.figure import draw
from examples.signatures.measurements import TRUNK, Measurements, Seed, Settings
from examples.signatures.verdicts import markdown

HERE = Path(__file__).parent
STEPS, QUICK_STEPS = 60, 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="a few small steps, to see that everything runs")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes, one on each core")
    parser.add_argument("--runs", type=Path, help="default: runs/signatures, with --quick runs/signatures-quick")
    parser.add_argument("--results", type=Path, help="default: beside this script, with --quick in the runs' folder")
    parser.add_argument("--table", action="store_true", help="only draw what is there")
    options = parser.parse_args()
    runs = (options.runs or ROOT / "runs" / ("signatures-quick" if options.quick else "signatures")).resolve()
    results = options.results or (runs / "results" if options.quick else HERE / "results")
    settings = Settings(runs, results, options.quick, QUICK_STEPS if options.quick else STEPS)
    seeds = [Seed(settings, seed) for seed in options.seeds]
    if not options.table:
        left = [seed for seed in seeds if not seed.is_done]
        share_out(left, settings.config(options.seeds[0], TRUNK, {}), options.jobs)
    found = [Measurements.read(path) for path in sorted(results.glob("seed-*.json"))]
    if not found:
        sys.exit(f"there are no results in {results} yet")
    text = markdown(found)
    (results / "table.md").write_text(text)
    draw(found, results / "signatures.png")
    print(text + f"figure: {results / 'signatures.png'}")
    return 0 if options.table else int(not all(seed.is_done for seed in seeds))


if __name__ == "__main__":
    raise SystemExit(main())
