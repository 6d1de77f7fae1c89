"""What came of each arm: a small JSON file, and the table and the figure that are made of these."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from examples.over_seeds import Mean, rounded
from examples.signatures.measurements import Score
from megatron_reheat.analysis.look import DPI, LIGHT, style

CONTROL, FLATTEN = "control", "flatten"
Record = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """On held-out problems at temperature 1: the `collapsed` policy, the policy at the `border` where reheating or flattening
    ended, None in the control, and at the arm's `end`. `reached` is whether it ended because the entropy was reached."""

    arm: str
    seed: int
    reheat_steps: int
    reached: bool
    collapsed: Score
    border: Score | None
    end: Score

    @classmethod
    def of(cls, arm: str, seed: int, collapsed: Score, records: Sequence[Record]) -> Outcome:
        reheated = [r for r in records if r["stage"] == "reheat"]
        changed = reheated or [r for r in records if "flatten/temperature" in r][:1]
        reached = bool(changed) and ("reheated" in str(changed[-1].get("event")) or arm == FLATTEN)
        border = Score.of(changed) if changed else None
        return cls(arm, seed, len(reheated), reached, collapsed, border, Score.of(records))

    @staticmethod
    def file(arm: str, seed: int) -> str:
        return f"seed-{seed}/{arm}.json"

    def write(self, folder: Path) -> None:
        path = folder / self.file(self.arm, self.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rounded(asdict(self)), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Outcome:
        values = json.loads(path.read_text())
        for key in ("collapsed", "border", "end"):
            values[key] = values[key] and Score(**values[key])
        return cls(**values)


# what is compared, and with which arm; the first was named before the runs
Difference = tuple[str, str, Callable[[Outcome], float]]


def _at_border(of: Callable[[Score], float]) -> Callable[[Outcome], float]:
    return lambda o: math.nan if o.border is None else of(o.border)


AVG_AT_BORDER = _at_border(lambda s: s.avg)
COLUMNS: dict[str, Callable[[Outcome], float]] = {
    "avg@8 at the border": AVG_AT_BORDER,
    "pass@8 there": _at_border(lambda s: s.pass_),
    "entropy there (nats)": _at_border(lambda s: s.entropy),
    "avg@8 at the end": lambda o: o.end.avg,
    "pass@8 there ": lambda o: o.end.pass_,
}


def against(outcomes: Sequence[Outcome], arm: str, base: str, of: Callable[[Outcome], float]) -> Mean:
    """An arm minus another one of the same seed, over the seeds that have both."""
    there = {o.seed: of(o) for o in outcomes if o.arm == base}
    return Mean.of([of(o) - there[o.seed] for o in outcomes if o.arm == arm and o.seed in there])


def markdown(outcomes: Sequence[Outcome]) -> str:
    """Each arm as it is; then what counts."""
    arms = list(dict.fromkeys(o.arm for o in sorted(outcomes, key=lambda o: (o.arm != CONTROL, o.arm))))
    collapsed = {o.seed: o.collapsed for o in outcomes}.values()
    lines = [
        f"Collapsed, {len(collapsed)} seeds: avg@8 {Mean.of([s.avg for s in collapsed]).show(3)}, pass@8 "
        f"{Mean.of([s.pass_ for s in collapsed]).show(3)}, entropy {Mean.of([s.entropy for s in collapsed]).show(3)} nats.",
        "",
        f"| arm | seeds | {' | '.join(COLUMNS)} | reheating steps | target reached |",
        "|---|---|" + "---|" * len(COLUMNS) + "---|---|",
    ]
    for arm in arms:
        mine = [o for o in outcomes if o.arm == arm]
        cells = [Mean.of([of(o) for o in mine]).show(3) if arm != CONTROL or "end" in name or name.endswith(" ") else ""
                 for name, of in COLUMNS.items()]  # fmt: skip
        steps = f"{statistics.fmean(o.reheat_steps for o in mine):.0f}"
        reached = "" if arm == CONTROL else f"{sum(o.reached for o in mine)} of {len(mine)}"
        lines.append(f"| {arm} | {len(mine)} | {' | '.join(cells)} | {steps} | {reached} |")
    lines += ["", "| avg@8 at the border, minus | " + " | ".join(a for a in arms if a not in (CONTROL, FLATTEN)) + " |"]
    reheats = [a for a in arms if a not in (CONTROL, FLATTEN)]
    lines.append("|---|" + "---|" * len(reheats))
    for base in (FLATTEN, *reheats[:-1]):
        cells = ["" if arm == base else _signed(against(outcomes, arm, base, AVG_AT_BORDER)) for arm in reheats]
        lines.append(f"| {base} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _signed(mean: Mean) -> str:
    return ("+" if mean.value >= 0 else "") + mean.show(3)


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Every seed's policies where reheating ended: accuracy against entropy, from the collapsed one on."""
    arms = sorted({o.arm for o in outcomes} - {CONTROL})
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(9.0, 5.5), dpi=DPI, layout="constrained")
        ax = figure.subplots()
        for arm, color in zip(arms, LIGHT.arms, strict=False):
            for i, o in enumerate(o for o in outcomes if o.arm == arm and o.border is not None):
                assert o.border is not None
                ax.plot(
                    [0.0, o.border.entropy - o.collapsed.entropy],
                    [0.0, o.border.avg - o.collapsed.avg],
                    color=color, marker="o", markersize=4, label=arm if i == 0 else None,
                )  # fmt: skip
        ax.axhline(0.0, color=LIGHT.muted, linewidth=1)
        ax.set_xlabel("held-out entropy gained (nats)")
        ax.set_title("held-out avg@8 lost on the way from the collapsed policy, seed by seed")
        ax.legend()
        figure.savefig(path, dpi=DPI)
