"""How far `reheat check`'s time estimates are from published figures: `python -m scripts.estimate_accuracy`.

Rows of the calibration set the constants that `cluster.published` names as fitted, which `--fit` does again; no row of the
validation set any.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace

from megatron_reheat.cluster.gpus import GPUS, Constants
from megatron_reheat.cluster.preflight import MAX_MEAN_TOKENS
from megatron_reheat.cluster.published import FITTED, Comparison, calibration, comparisons


def table(rows: list[Comparison]) -> str:
    """In Markdown, the calibration first, with the largest miss of either set below."""
    lines = ["| figure | measured | estimated | ratio | set | assumed |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: not row.calibration):
        used = "calibration" if row.calibration else "validation"
        cells = (
            row.what,
            f"{_figure(row.published)} {row.unit}",
            _figure(row.modeled),
            f"{row.ratio:.2f}",
            used,
            row.assumed,
        )
        lines.append(f"| {' | '.join(cells)} |")
    for name, part in (("calibration", True), ("validation", False)):
        of = sorted((row for row in rows if row.calibration == part), key=lambda row: row.off)
        median = of[len(of) // 2].off
        lines.append(
            f"\n{len(of)} rows of {name}: median off by {median:.2f}x, at most by {of[-1].off:.1f}x ({of[-1].what})"
        )
    return "\n".join(lines)


def fit(start: Constants) -> Constants:
    """The `FITTED` constants with the least squares of log ratios over the calibration, one by one in ever smaller steps."""

    def misses(constants: Constants) -> float:
        gpus = {name: replace(gpu, constants=constants) for name, gpu in GPUS.items()}
        return sum(math.log(row.ratio) ** 2 for row in calibration(gpus))

    return _descend(misses, start)


def _descend(misses: Callable[[Constants], float], best: Constants) -> Constants:
    least, step = misses(best), 0.2
    while step > 2e-3:
        before = least
        for name in FITTED:
            for factor in (1 + step, 1 / (1 + step)):
                tried = replace(best, **{name: getattr(best, name) * factor})
                if (now := misses(tried)) < least:
                    best, least = tried, now
        if before - least < 1e-3 * before:
            step /= 2
    return best


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit the constants to the calibration again, and print them")
    if parser.parse_args().fit:
        found = fit(replace(Constants(), **dict.fromkeys(FITTED, 0.5) | {"layer_launch_s": 1e-3}))
        for name in FITTED:
            print(f"{name}: {getattr(found, name):.3g} (in use: {getattr(Constants(), name):g})")
    print(table(comparisons(MAX_MEAN_TOKENS)))


if __name__ == "__main__":
    main()
