"""The trajectories behind the table: one thin line a seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.signatures.measurements import TEMPERATURES, Measurements
from megatron_reheat.analysis.look import DPI, LIGHT, style


def draw(seeds: Sequence[Measurements], path: Path) -> None:
    """Entropies by teacher, gradient norms by direction, reheating without a collapse, and cooling."""
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(12.0, 7.6), dpi=DPI, layout="constrained")
        (teachers, norms), (uncollapsed, cooling) = figure.subplots(2, 2)
        for i, temperature in enumerate(TEMPERATURES):
            _lines(teachers, f"T {temperature:g}", [m.entropies[str(temperature)] for m in seeds], i)
        _finish(teachers, "c: entropy by the teacher's temperature (forward KL)", "nats")
        for i, name in enumerate(("forward", "reverse")):
            _lines(norms, f"{name} KL", [getattr(m, f"{name}_norms") for m in seeds], i)
        _finish(norms, "d: gradient norm by direction (T 1.2)", "norm")
        _lines(uncollapsed, "not collapsed", [m.uncollapsed for m in seeds], 1)
        _lines(uncollapsed, "collapsed", [m.entropies[str(TEMPERATURES[0])] for m in seeds], 0)
        _finish(uncollapsed, "e: entropy where nothing stops it (T 1.2)", "nats")
        _lines(cooling, "cooling (T 0.8, reverse KL)", [m.cooling for m in seeds], 2)
        for m in seeds:
            cooling.axhline(
                m.entropies[str(TEMPERATURES[0])][0], color=LIGHT.text, linestyle=(0, (4, 3)), linewidth=0.9
            )
        _finish(cooling, "g: entropy while it is cooled; dashed: when collapsed", "nats")
        figure.savefig(path, dpi=DPI)


def _lines(ax: Axes, label: str, lines: Sequence[Sequence[float]], colour: int) -> None:
    for i, values in enumerate(lines):
        ax.plot(range(len(values)), values, color=LIGHT.arms[colour], linewidth=1.3, label=None if i else label)


def _finish(ax: Axes, title: str, unit: str) -> None:
    ax.set_title(title)
    ax.set_xlabel("updates")
    ax.set_ylabel(unit)
    ax.legend(loc="best")
