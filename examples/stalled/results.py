"""What came of the stalled policies and of each arm: small JSON files, and the table and the figure that are made of these."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import matplotlib
from matplotlib.figure import Figure

from examples.over_seeds import Mean, rounded
from megatron_reheat.analysis.look import DPI, LIGHT, style

CONTROL = "control"
STRETCH = 10  # steps of a curve that are one mean

Record = dict[str, Any]


class Curves(NamedTuple):
    """Means of every STRETCH steps of RL: training reward, share of groups whose rewards are all the same, entropy in nats."""

    reward: list[float]
    uniform: list[float]
    entropy: list[float]

    @classmethod
    def of(cls, records: Sequence[Record]) -> Self:
        rl = [r for r in records if r["stage"] == "rlvr" and r.get("reward/mean") is not None]
        names = ("reward/mean", "reward/uniform_group_fraction", "entropy/mean")
        return cls(*([statistics.fmean(r[n] for r in part) for part in _stretches(rl)] for n in names))


def _stretches(records: Sequence[Record]) -> list[Sequence[Record]]:
    return [records[i : i + STRETCH] for i in range(0, len(records), STRETCH)]


class _Kept:
    """A dataclass as a JSON file."""

    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rounded(asdict(self))) + "\n")  # type: ignore[call-overload]

    @classmethod
    def read(cls, path: Path) -> Self:
        values = json.loads(path.read_text())
        return cls(**{**values, "curves": Curves(*values["curves"])})


@dataclass(frozen=True)
class Stall(_Kept):
    """The policy that all arms of a seed start from, on held-out problems, and how RL came there."""

    seed: int
    k: int
    warm_avg: float
    warm_pass: float
    avg: float
    pass_: float
    entropy: float
    curves: Curves

    @classmethod
    def of(cls, seed: int, k: int, records: Sequence[Record]) -> Stall:
        first, last = (next(r for r in rs if "eval/avg_at_k" in r) for rs in (records, records[::-1]))
        ends = (first["eval/avg_at_k"], first["eval/pass_at_k"], last["eval/avg_at_k"], last["eval/pass_at_k"])
        return cls(seed, k, *ends, last["eval/entropy"], Curves.of(records))

    @staticmethod
    def file(seed: int) -> str:
        return f"seed-{seed}/stall.json"

    def write(self, folder: Path) -> None:
        self._write(folder / self.file(self.seed))

    @property
    def late_gain(self) -> float:
        """Of the training reward: the last 50 steps' mean over that of the 50 before."""
        per = 50 // STRETCH
        before, after = self.curves.reward[-2 * per : -per], self.curves.reward[-per:]
        return statistics.fmean(after) - statistics.fmean(before) if before else math.nan


@dataclass(frozen=True)
class Outcome(_Kept):
    """One arm after its `steps`, of which `reheat_steps` reheated; held-out scores, entropy in nats on held-out problems."""

    arm: str
    seed: int
    steps: int
    reheat_steps: int
    avg: float
    pass_: float
    entropy: float
    curves: Curves

    @classmethod
    def of(cls, arm: str, seed: int, steps: int, records: Sequence[Record]) -> Outcome:
        last = next(r for r in reversed(records) if "eval/avg_at_k" in r)
        reheated = sum(r["stage"] == "reheat" for r in records)
        scores = (last["eval/avg_at_k"], last["eval/pass_at_k"], last["eval/entropy"])
        return cls(arm, seed, steps, reheated, *scores, Curves.of(records))

    @staticmethod
    def file(arm: str, seed: int) -> str:
        return f"seed-{seed}/arm-{arm}.json"

    def write(self, folder: Path) -> None:
        self._write(folder / self.file(self.arm, self.seed))

    @property
    def reward(self) -> float:
        """On the training problems, over the last 50 steps of RL."""
        return statistics.fmean(self.curves.reward[-50 // STRETCH :])


# what a table's column is, and a panel of the figure: the first one was named before the runs
MEASURES: dict[str, Callable[[Outcome], float]] = {
    "avg@{k}": lambda o: o.avg,
    "pass@{k}": lambda o: o.pass_,
    "training reward": lambda o: o.reward,
    "entropy (nats)": lambda o: o.entropy,
}


def against_control(outcomes: Sequence[Outcome], arm: str, of: Callable[[Outcome], float]) -> Mean:
    """An arm minus the control of the same seed, over the seeds that have both."""
    control = {o.seed: of(o) for o in outcomes if o.arm == CONTROL}
    return Mean.of([of(o) - control[o.seed] for o in outcomes if o.arm == arm and o.seed in control])


def markdown(stalls: Sequence[Stall], outcomes: Sequence[Outcome]) -> str:
    """Where the arms started from; then each arm, as it is and against the control."""
    k = stalls[0].k
    started = [
        ("avg", [s.warm_avg for s in stalls], [s.avg for s in stalls]),
        ("pass", [s.warm_pass for s in stalls], [s.pass_ for s in stalls]),
    ]
    said = [f"{name}@{k} {Mean.of(a).show(3)} -> {Mean.of(b).show(3)}" for name, a, b in started]
    uniform = Mean.of([s.curves.uniform[-1] for s in stalls]).show(2)
    gain = Mean.of([s.late_gain for s in stalls]).show(3)
    lines = [
        f"The stall, {len(stalls)} seeds, warm start -> where the arms begin: {'; '.join(said)}; entropy there "
        f"{Mean.of([s.entropy for s in stalls]).show(3)} nats, uniform groups {uniform}, training reward of the last 50 steps "
        f"minus that of the 50 before {gain}.",
        "",
        f"| arm | seeds | {' | '.join(f'{n.format(k=k)} | - control' for n in MEASURES)} | reheating steps |",
        "|---|---|" + "---|---|" * len(MEASURES) + "---|",
    ]
    for arm in _arms(outcomes):
        mine = [o for o in outcomes if o.arm == arm]
        cells = []
        for of in MEASURES.values():
            cells.append(Mean.of([of(o) for o in mine]).show(3))
            difference = against_control(outcomes, arm, of) if arm != CONTROL else None
            cells.append("" if difference is None else ("+" if difference.value >= 0 else "") + difference.show(3))
        lines.append(
            f"| {arm} | {len(mine)} | {' | '.join(cells)} | {statistics.fmean(o.reheat_steps for o in mine):.0f} |"
        )
    return "\n".join(lines) + "\n"


def _arms(outcomes: Sequence[Outcome]) -> list[str]:
    """Of those with a control beside them, the control first."""
    seeds = {o.seed for o in outcomes if o.arm == CONTROL}
    return sorted({o.arm for o in outcomes if o.seed in seeds}, key=lambda arm: (arm != CONTROL, arm))


def draw(stalls: Sequence[Stall], outcomes: Sequence[Outcome], path: Path) -> None:
    """Training reward and entropy along the runs, means over seeds, and each arm's scores against the control's."""
    arms = _arms(outcomes)
    colors = dict(zip(arms, itertools.cycle(LIGHT.arms), strict=False))
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(12.0, 8.0), dpi=DPI, layout="constrained")
        axes = figure.subplots(2, 2)
        for ax, title, index in ((axes[0, 0], "training reward", 0), (axes[0, 1], "entropy (nats)", 2)):
            trunk = _mean_curve([s.curves[index] for s in stalls])
            ax.plot([STRETCH * (i + 1) for i in range(len(trunk))], trunk, color=LIGHT.muted)
            for arm in arms:
                curve = _mean_curve([o.curves[index] for o in outcomes if o.arm == arm])
                start = STRETCH * len(trunk)
                ax.plot([start + STRETCH * (i + 1) for i in range(len(curve))], curve, color=colors[arm], label=arm)
            ax.set_title(f"{title}; RL steps (mean over seeds)")
        k = stalls[0].k
        for ax, (name, of) in zip(axes[1], list(MEASURES.items())[:2], strict=True):
            others = [arm for arm in arms if arm != CONTROL]
            for y, arm in enumerate(others):
                mean = against_control(outcomes, arm, of)
                half = mean.half if math.isfinite(mean.half) else 0.0
                ax.errorbar([mean.value], [y], xerr=[half], fmt="o", color=colors[arm], markersize=5)
            ax.axvline(0.0, color=LIGHT.muted, linewidth=1)
            ax.set_yticks(range(len(others)), others)
            ax.set_title(f"held-out {name.format(k=k)} minus the control's")
        axes[0, 1].legend()
        figure.savefig(path, dpi=DPI)


def _mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*curves, strict=False)]
