"""What came of the runs: one small JSON file each, and the table and the figure that are made of these alone."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.over_seeds import Mean, rounded
from megatron_reheat.analysis.look import DPI, LIGHT, style
from megatron_reheat.analysis.tracks import stage_spans

BASELINE = "grpo"
CURVE_POINTS = 30


@dataclass(frozen=True)
class Result:
    """One run, after its warm start: `steps` of RL and, with `reheat`, of reheating among them.

    `avg` and `pass_` are avg@k and pass@k, `entropy` is in nats, all three on held-out problems at the end; `tokens` were
    trained on, prompts included; `seconds` are those of the steps. `curve` is the entropy of the training rollouts along the
    run, in means of equal stretches. A run that failed has `error` and nothing else.
    """

    method: str
    reheat: bool
    seed: int
    steps: int
    k: int = 0
    avg: float = math.nan
    pass_: float = math.nan
    entropy: float = math.nan
    tokens: float = math.nan
    seconds: float = math.nan
    gradient_norm: float = math.nan
    rounds: int = 0
    curve: tuple[float, ...] = ()
    error: str | None = None

    @property
    def file(self) -> str:
        return f"seed-{self.seed}/{self.method}{'-reheat' * self.reheat}.json"

    def write(self, folder: Path) -> None:
        """Numbers that a failed run does not have are null."""
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rounded(asdict(self))) + "\n")

    @classmethod
    def read(cls, path: Path) -> Result:
        values = {k: math.nan if v is None and k != "error" else v for k, v in json.loads(path.read_text()).items()}
        return cls(**{**values, "curve": tuple(values["curve"])})


def measured(records: Sequence[dict[str, Any]], result: Result) -> Result:
    """`records` are the run's own steps, from its metrics.jsonl."""
    end = next(r for r in reversed(records) if "eval/avg_at_k" in r)
    rl = [r for r in records if r["stage"] == "rlvr"]
    entropies = [r["entropy/mean"] for r in records if r.get("entropy/mean") is not None]
    trained = [r for r in records if r.get("throughput/tokens_per_s") is not None]
    return replace(
        result,
        avg=end["eval/avg_at_k"],
        pass_=end["eval/pass_at_k"],
        entropy=end["eval/entropy"],
        tokens=sum(r["throughput/tokens_per_s"] * r["time/step_s"] for r in trained),
        seconds=sum(r.get("time/step_s", 0.0) for r in records),
        gradient_norm=statistics.median(
            r["optimizer/grad_norm"] for r in rl if r.get("optimizer/grad_norm") is not None
        ),
        rounds=sum(span.stage == "reheat" for span in stage_spans(records)),
        curve=tuple(_in_stretches(entropies, CURVE_POINTS)),
    )


def _in_stretches(values: Sequence[float], count: int) -> list[float]:
    """Means of `count` stretches that are as equal as can be; of fewer values, these."""
    count = min(count, len(values))
    cuts = [round(i * len(values) / count) for i in range(count + 1)]
    return [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(cuts)]


def read_all(folder: Path) -> list[Result]:
    return [Result.read(path) for path in sorted(folder.glob("seed-*/*.json"))]


class Quantity(NamedTuple):
    """A column of the table and a panel of the figure."""

    title: str
    of: Callable[[Result], float]
    digits: int


def quantities(k: int) -> list[Quantity]:
    return [
        Quantity("entropy (nats)", lambda r: r.entropy, 3),
        Quantity(f"avg@{k}", lambda r: r.avg, 3),
        Quantity(f"pass@{k}", lambda r: r.pass_, 3),
        Quantity("tokens (M)", lambda r: r.tokens / 1e6, 2),
        Quantity("seconds", lambda r: r.seconds, 0),
        Quantity("gradient norm", lambda r: r.gradient_norm, 3),
    ]


class Row(NamedTuple):
    """One method, with reheating or without. `against` is its avg@k minus the baseline's, paired by seed."""

    method: str
    reheat: bool
    seeds: int
    failed: int
    rounds: float
    values: tuple[Mean, ...]
    against: Mean | None

    @property
    def label(self) -> str:
        return self.method + " + reheating" * self.reheat


def rows(results: Iterable[Result]) -> list[Row]:
    """The baseline first, then by name; what is compared has the same steps, seed by seed."""
    results = list(results)
    arms = sorted({(r.method != BASELINE, r.method, r.reheat) for r in results})
    baseline = {r.seed: r.avg for r in results if (r.method, r.reheat) == (BASELINE, False) and r.error is None}
    return [_row([r for r in results if (r.method, r.reheat) == tuple(arm)], baseline) for _, *arm in arms]


def _row(results: list[Result], baseline: Mapping[int, float]) -> Row:
    method, reheat = results[0].method, results[0].reheat
    done = [r for r in results if r.error is None]
    paired = [r.avg - baseline[r.seed] for r in done if r.seed in baseline]
    return Row(
        method,
        reheat,
        len(done),
        len(results) - len(done),
        statistics.fmean(r.rounds for r in done) if done else 0.0,
        tuple(Mean.of([q.of(r) for r in done]) for q in quantities(done[0].k)) if done else (),
        Mean.of(paired) if paired and (method, reheat) != (BASELINE, False) else None,
    )


def markdown(results: Sequence[Result]) -> str:
    """The table, in the form of a README."""
    k = max(r.k for r in results)  # a failed run has none
    titles = ["method", "seeds", "rounds", *(q.title for q in quantities(k)), f"avg@{k} - GRPO's"]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in rows(results):
        seeds = f"{row.seeds}" + (f" ({row.failed} failed)" if row.failed else "")
        cells = [v.show(q.digits) for v, q in zip(row.values, quantities(k), strict=True)] if row.values else ["-"] * 6
        against = row.against.show(3) if row.against is not None else "-"
        rounds = f"{row.rounds:.1f}" if row.reheat else "-"
        lines.append(f"| {' | '.join([row.label, seeds, rounds, *cells, against])} |")
    return "\n".join(lines) + "\n"


def effect_of_reheating(results: Sequence[Result]) -> str:
    """One sentence: with reheating minus without, of the same method and seed, where there was a round.

    The mean over methods of each seed counts as one value, as its runs share a warm start. Empty where there is none.
    """
    done = {(r.method, r.seed, r.reheat): r for r in results if r.error is None}
    pairs = [
        (r, done[m, s, False]) for (m, s, reheat), r in done.items() if reheat and r.rounds and (m, s, False) in done
    ]
    if not pairs:
        return ""
    seeds = sorted({r.seed for r, _ in pairs})

    def effect(of: Callable[[Result], float]) -> str:
        per_seed = [statistics.fmean(of(a) - of(b) for a, b in pairs if a.seed == seed) for seed in seeds]
        mean = Mean.of(per_seed)
        return ("+" if mean.value >= 0 else "") + mean.show(3)

    k = max(r.k for r in results)
    return (
        f"Reheating against none, {len(pairs)} pairs of runs, {len(seeds)} seeds: avg@{k} {effect(lambda r: r.avg)}, "
        f"pass@{k} {effect(lambda r: r.pass_)}, entropy {effect(lambda r: r.entropy)} nats.\n"
    )


def draw(results: Sequence[Result], path: Path) -> None:
    """Every quantity as a mean with its interval, methods down the side."""
    shown = [row for row in rows(results) if row.values]
    methods = list(dict.fromkeys(row.method for row in shown))
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(13.0, 2.2 + 0.62 * len(methods)), dpi=DPI, layout="constrained")
        axes = figure.subplots(2, 3, sharey=True)
        for i, (ax, quantity) in enumerate(zip(axes.flat, quantities(max(r.k for r in results)), strict=True)):
            _draw_quantity(ax, quantity.title, [(methods.index(r.method), r.reheat, r.values[i]) for r in shown])
            ax.set_yticks(range(len(methods)), methods)
            ax.set_ylim(len(methods) - 0.5, -0.5)
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2)
        figure.savefig(path, dpi=DPI)


def _draw_quantity(ax: Axes, title: str, points: Sequence[tuple[int, bool, Mean]]) -> None:
    for reheat, offset in ((False, -0.14), (True, 0.14)):
        mine = [(y + offset, mean) for y, with_reheating, mean in points if with_reheating == reheat]
        ax.errorbar(
            [mean.value for _, mean in mine],
            [y for y, _ in mine],
            xerr=[mean.half if math.isfinite(mean.half) else 0.0 for _, mean in mine],
            fmt="s" if reheat else "o",
            color=LIGHT.arms[reheat],
            markersize=4.5,
            elinewidth=1.4,
            label="with reheating" if reheat else "without",
        )
    ax.set_title(title)
