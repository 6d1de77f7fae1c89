"""The pictures of a comparison, drawn without a display: all panels in one figure, and each by itself for the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from megatron_reheat.analysis.look import DARK, DPI, LIGHT, Theme, style
from megatron_reheat.analysis.plots import PANEL_INCHES, Picture, draw_alone, png
from megatron_reheat.analysis.rounds import OVERALL
from megatron_reheat.microscope.figures import Comparison

SIZE_INCHES = (13.0, 7.6)
LONGEST_NAME = 46


@dataclass(frozen=True)
class View:
    """A comparison in one of the colour schemes."""

    comparison: Comparison
    theme: Theme

    @property
    def colours(self) -> tuple[str, str]:
        """Of A and B."""
        return self.theme.arms[0], self.theme.arms[1]


@dataclass(frozen=True)
class Panel:
    """One of the page's pictures, with its title."""

    title: str
    picture: Picture


def draw_comparison(comparison: Comparison) -> bytes:
    """PNG of all panels, SIZE_INCHES x DPI pixels."""
    view = View(comparison, LIGHT)
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.12)  # type: ignore[union-attr, call-arg]
        for ax, draw in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
            draw(ax, view)
        names = (("A", comparison.a), ("B", comparison.b), ("C", comparison.reference))
        title = "     ".join(f"{letter}: {_end_of(name)}" for letter, name in names if name is not None)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
        return png(figure)


def draw_panels(comparison: Comparison) -> list[Panel]:
    """Each by itself, in light and in dark, in the order of PANELS."""
    views = [View(comparison, theme) for theme in (LIGHT, DARK)]
    return [Panel(*draw_alone(draw, views, PANEL_INCHES)) for draw in PANELS]


def draw_entropy_histogram(ax: Axes, view: View) -> None:
    """A's and B's, with counts on a logarithmic axis."""
    histogram = view.comparison.tokens.entropy
    for name, counts, colour in zip("AB", (histogram.a, histogram.b), view.colours, strict=True):
        ax.stairs(counts, histogram.edges, color=colour, linewidth=1.7, label=name)
        ax.stairs(counts, histogram.edges, color=colour, fill=True, alpha=0.15)
    # most tokens of a sharp policy are in the first bin
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.7)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.set(title="Entropy of the tokens", xlabel="nats", ylabel="tokens")
    ax.legend()


def draw_kl_by_position(ax: Axes, view: View) -> None:
    """Both directions; on a logarithmic axis unless the policies agree everywhere."""
    _by_position(ax, view, [("KL(A || B)", "kl_ab"), ("KL(B || A)", "kl_ba")], view.colours)
    # a policy against itself has nothing that a logarithm could show
    if any(each.means.kl_ab > 0 for each in view.comparison.tokens.positions):
        ax.set_yscale("log", nonpositive="mask")
        _few_ticks(ax)
    ax.set(title="KL divergence by position", ylabel="nats")


def draw_overlap(ax: Axes, view: View) -> None:
    """Means of the share of the ten likeliest tokens that both have."""
    _by_position(ax, view, [("", "overlap")], (view.theme.arms[2],))
    ax.set(title="Top-10 overlap by position", ylabel="share", ylim=(0, 1.04))


def draw_entropy_by_position(ax: Axes, view: View) -> None:
    """Means of A and B."""
    _by_position(ax, view, [("A", "entropy_a"), ("B", "entropy_b")], view.colours)
    top = max(max(each.means.entropy_a, each.means.entropy_b) for each in view.comparison.tokens.positions)
    ax.set(title="Entropy by position", ylabel="nats", ylim=(0, 1.08 * top or 1.0))


def draw_cka(ax: Axes, view: View) -> None:
    """Block by block; says why where there is none."""
    cka = view.comparison.cka
    if cka is None:
        _say_empty(ax, view, "Linear CKA", "the models have different numbers of layers,\nor --cka-tokens is 0")
        return
    values = [np.nan if value is None else value for value in cka.values()]
    ax.plot(values, color=view.theme.arms[2], marker="o", markersize=4)
    _name_blocks(ax, list(cka))
    # what is alike shows its differences, what is not begins at zero
    bottom = min((value for value in values if np.isfinite(value)), default=0.0)
    ax.set_ylim(0 if bottom < 0.9 else bottom - 0.1 * max(1 - bottom, 1e-3), 1 + 0.1 * max(1 - bottom, 1e-3))
    ax.ticklabel_format(axis="y", useOffset=False)
    ax.set(title="Linear CKA by layer")


def draw_displacement(ax: Axes, view: View) -> None:
    """Block by block, relative to |A|; where there is a C, the cosines with C - A have an axis of their own."""
    blocks = [block for block in view.comparison.displacement or () if block.block != OVERALL]
    if not blocks:
        _say_empty(ax, view, "Weight displacement", "the models' weights have different shapes")
        return
    ax.bar(
        range(len(blocks)), [block.relative or 0.0 for block in blocks], color=view.theme.arms[2], alpha=0.6, width=0.7
    )
    _name_blocks(ax, [block.block for block in blocks])
    ax.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    ax.set(title="Weight displacement", ylabel="|B - A| / |A|")
    if any(block.cosine is not None for block in blocks):
        ax.set_ylim(top=1.25 * (ax.get_ylim()[1] or 1.0))
        _draw_cosines(ax, view, [np.nan if block.cosine is None else block.cosine for block in blocks])


PANELS: tuple[Callable[[Axes, View], None], ...] = (
    draw_entropy_histogram,
    draw_kl_by_position,
    draw_overlap,
    draw_entropy_by_position,
    draw_cka,
    draw_displacement,
)


def _draw_cosines(ax: Axes, view: View, cosines: Sequence[float]) -> None:
    other = ax.twinx()
    other.plot(cosines, color=view.theme.arms[3], marker="o", markersize=4, linestyle=(0, (3, 2)))
    other.set_ylim(-1.05, 1.05)
    other.grid(visible=False)
    other.spines["right"].set_visible(True)
    other.set_ylabel("cosine with C - A", color=view.theme.arms[3])


def _by_position(ax: Axes, view: View, lines: Sequence[tuple[str, str]], colours: Sequence[str]) -> None:
    bins = view.comparison.tokens.positions
    middles = [(each.first * each.last) ** 0.5 for each in bins]
    for (label, field), colour in zip(lines, colours, strict=True):
        values = [getattr(each.means, field) for each in bins]
        ax.plot(middles, values, color=colour, marker="o", markersize=4, label=label or None)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("position in the response")
    if len(lines) > 1:
        ax.legend()


def _few_ticks(ax: Axes) -> None:
    """A span of less than two decades gets labels between the powers of ten, which are too few there."""
    low, high = ax.get_ylim()
    subs = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=subs, numticks=8))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _name_blocks(ax: Axes, names: Sequence[str]) -> None:
    """Numbers for layers, letters for what is before and behind them, and no two so near that they touch."""
    letters = {name: name[0].upper() for name in names if not name.startswith("layer ")}
    last = len(names) - len(letters)
    step = max(1, -(-last // 9))
    shown = [
        i for i, name in enumerate(names) if name in letters or (i % step == 0 and (step == 1 or last - i >= step))
    ]
    ax.set_xticks(shown, [letters.get(names[i], names[i].removeprefix("layer ")) for i in shown])
    ax.grid(axis="x", visible=False)
    ax.set_xlabel(f"layer ({', '.join(f'{letter}: {name}' for name, letter in letters.items())})")


def _end_of(name: str) -> str:
    """A path's end says more than its beginning."""
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def _say_empty(ax: Axes, view: View, title: str, why: str) -> None:
    ax.set_title(title)
    ax.set_axis_off()
    ax.text(0.5, 0.5, f"left out:\n{why}", ha="center", va="center", color=view.theme.muted, transform=ax.transAxes)
