"""The figure of a report, drawn without a display. Colours are Okabe and Ito's, safe for colour-blind readers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from megatron_reheat.analysis.tracks import RealArray, Track, trailing_mean

SIZE_INCHES = (13.0, 11.0)
DPI = 140

LineStyle = str | tuple[float, tuple[float, ...]]

TRUNK_COLOUR = "#4d4d4d"
ARM_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
ARM_STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1)))  # a second and third round of colours
REHEAT_SHADE, SFT_SHADE = "#e69f00", "#8c8c8c"
TIME_PARTS = (
    ("rollout", "#0072b2"),
    ("reward", "#cc79a7"),
    ("score", "#56b4e9"),
    ("update", "#009e73"),
    ("sync", "#e69f00"),
    ("other", "#bbbbbb"),
)
_WORDS = {"reward/accuracy": "accuracy", "reward/mean": "reward"}
LAYOUT = [["entropy"] * 6, ["reward"] * 3 + ["passk"] * 3, ["mismatch"] * 2 + ["grad"] * 2 + ["time"] * 2]
STYLE = {
    "font.size": 10.5,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.7,
    "lines.solid_joinstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "text.parse_math": False,  # a run called a$b$c is not a formula
}


@dataclass(frozen=True)
class _Look:
    colour: str
    style: LineStyle
    shade: str  # of its reheat stages: with several arms the shade says whose


def draw_report(tracks: Sequence[Track]) -> bytes:
    """PNG of all panels, SIZE_INCHES x DPI pixels. A panel without data says so."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.12)  # type: ignore[union-attr, call-arg]
        axes: dict[str, Axes] = figure.subplot_mosaic(LAYOUT, height_ratios=[1.2, 1.1, 0.95])
        looks = _looks(tracks)
        _draw_entropy(axes["entropy"], tracks, looks)
        _draw_reward(axes["reward"], tracks, looks)
        _draw_passk(axes["passk"], tracks, looks)
        _draw_lines(axes["mismatch"], tracks, looks, "rollout/mismatch_kl", "Mismatch KL", "nats")
        _draw_lines(axes["grad"], tracks, looks, "optimizer/grad_norm", "Gradient norm", "")
        _draw_time(axes["time"], tracks)
        _share_steps(axes, tracks, looks)
        handles = _legend(tracks, looks)
        longest = max(len(str(handle.get_label())) for handle in handles)
        columns = 6 if longest <= 18 else 4 if longest <= 28 else 3
        figure.legend(handles=handles, loc="outside upper left", ncols=columns, fontsize=10.5)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def visible_steps(tracks: Sequence[Track]) -> tuple[float, float]:
    """First and last step to show: a long sft warm start is cut so that it takes a tenth of the width, at most."""
    spans = [span for track in tracks for span in track.spans()]
    if not spans:
        steps = [r["step"] for track in tracks for r in track.records]
        return min(steps) - 0.5, max(steps) + 0.5
    start, end = min(s.start for s in spans), max(s.end for s in spans)
    after_sft = [s.start for s in spans if s.stage != "sft"]
    if after_sft:
        start = max(start, round(min(after_sft) - 0.11 * (end - min(after_sft))))
    return start, end + 0.01 * (end - start)


def _looks(tracks: Sequence[Track]) -> list[_Look]:
    num_arms = sum(not track.is_trunk for track in tracks)
    looks: list[_Look] = []
    arm = 0
    for track in tracks:
        if track.is_trunk:
            looks.append(_Look(TRUNK_COLOUR, "-", REHEAT_SHADE))
            continue
        colour = ARM_COLOURS[arm % len(ARM_COLOURS)]
        style = ARM_STYLES[arm // len(ARM_COLOURS) % len(ARM_STYLES)]
        looks.append(_Look(colour, style, REHEAT_SHADE if num_arms == 1 else colour))
        arm += 1
    return looks


def _draw_entropy(ax: Axes, tracks: Sequence[Track], looks: Sequence[_Look]) -> None:
    thresholds = {
        (float(value), words)
        for track in tracks
        for key, words in (("collapse_below", "collapse below"), ("reheat_to", "reheat to"))
        if (value := track.setting("controller", key)) is not None
    }
    levels = [value for value, _ in thresholds]
    title = "Token entropy of training rollouts"
    _draw_lines(ax, tracks, looks, "entropy/mean", title, "nats", smooth=False, levels=levels)
    if not any(track.has("entropy/mean") for track in tracks):
        return
    for value, words in sorted(thresholds):
        ax.axhline(value, color="#333333", linestyle=(0, (4, 3)), linewidth=1.1)
        # On the left, where a run begins with high entropy; the lower threshold is labelled below its line.
        below = words == "collapse below"
        ax.annotate(
            f"{words} {value:g}",
            (0.008, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, -4 if below else 3),
            textcoords="offset points",
            va="top" if below else "bottom",
            fontsize=9.5,
        )


def _draw_reward(ax: Axes, tracks: Sequence[Track], looks: Sequence[_Look]) -> None:
    """The reward has a line of its own where it is not the accuracy."""
    names = [m for m in ("reward/accuracy", "reward/mean") if any(track.has(m) for track in tracks)]
    if not names:
        _say_empty(ax, "Training accuracy and reward", "reward/accuracy, reward/mean")
        return
    same = len(names) == 2 and all(_coincide(track, *names) for track in tracks)
    drawn = names[:1] if same else names
    windows = [_plot_smoothed(ax, tracks, looks, name, ":" if i else None) for i, name in enumerate(drawn)]
    what = "accuracy (= reward)" if same else " and ".join(_WORDS[name] for name in names)
    _title(ax, f"Training {what}{_averaged(windows[0])}", "")
    if len(drawn) == 2:
        ax.margins(y=0.15)
        _key_lines(ax, [("accuracy", "-", ""), ("reward", ":", "")])


def _draw_passk(ax: Axes, tracks: Sequence[Track], looks: Sequence[_Look]) -> None:
    samples = {track.setting("eval", "num_samples") for track in tracks} - {None}
    k = str(samples.pop()) if len(samples) == 1 else "k"
    kinds: list[tuple[str, str, LineStyle, str]] = [
        ("eval/avg_at_k", f"avg@{k}", "-", "o"),
        ("eval/pass_at_k", f"pass@{k}", (0, (3, 2)), "s"),
    ]
    if not any(track.has(metric) for metric, *_ in kinds for track in tracks):
        _say_empty(ax, "Held-out evaluation", "eval/avg_at_k, eval/pass_at_k")
        return
    for metric, _, style, marker in kinds:
        for track, look in zip(tracks, looks, strict=True):
            fill = look.colour if marker == "o" else "white"
            ax.plot(
                *track.series(metric), color=look.colour, linestyle=style, marker=marker, markersize=5.5,
                markerfacecolor=fill, linewidth=1.5,
            )  # fmt: skip
    _title(ax, "Held-out evaluation", "")
    ax.margins(y=0.18)  # room for the key
    _key_lines(ax, [(label, style, marker) for _, label, style, marker in kinds])


def _draw_lines(
    ax: Axes,
    tracks: Sequence[Track],
    looks: Sequence[_Look],
    metric: str,
    title: str,
    unit: str,
    *,
    smooth: bool = True,
    levels: Sequence[float] = (),
) -> None:
    """`levels` are values that stay in view whatever the data."""
    if not any(track.has(metric) for track in tracks):
        _say_empty(ax, title, metric)
        return
    if smooth:
        title += _averaged(_plot_smoothed(ax, tracks, looks, metric))
    else:
        for track, look in zip(tracks, looks, strict=True):
            _plot(ax, track.series(metric), look)
    _title(ax, title, unit)
    first, last = visible_steps(tracks)
    shown = [v[(s >= first) & (s <= last)] for s, v in (track.series(metric) for track in tracks)]
    _scale(ax, np.concatenate([*(v[np.isfinite(v)] for v in shown), np.asarray(levels, dtype=np.float64)]))


def _plot_smoothed(
    ax: Axes, tracks: Sequence[Track], looks: Sequence[_Look], metric: str, style: LineStyle | None = None
) -> int:
    """Running means over faint raw values; returns the number of steps averaged."""
    window = max(1, max(len(track.series(metric)[0]) for track in tracks) // 40)
    for track, look in zip(tracks, looks, strict=True):
        if window > 1:
            ax.plot(*track.series(metric), color=look.colour, alpha=0.2, linewidth=0.8)
        _plot(ax, track.series(metric, window), look, style)
    return window


def _plot(ax: Axes, series: tuple[RealArray, RealArray], look: _Look, style: LineStyle | None = None) -> None:
    marker = "o" if len(series[0]) == 1 else ""  # a line of one point would be invisible
    ax.plot(*series, color=look.colour, linestyle=style or look.style, marker=marker)


def _averaged(window: int) -> str:
    return f", {window}-step mean" if window > 1 else ""


def _draw_time(ax: Axes, tracks: Sequence[Track]) -> None:
    parts = [(name, colour) for name, colour in TIME_PARTS if any(track.has(f"time/{name}_s") for track in tracks)]
    if not parts:
        _say_empty(ax, "Step time", "time/*_s")
        return
    arms = [track for track in tracks if not track.is_trunk] or list(tracks)
    if len(arms) == 1:
        _stack_over_steps(ax, tracks, parts)
    else:
        _stack_by_arm(ax, arms, parts)


def _stack_over_steps(ax: Axes, tracks: Sequence[Track], parts: Sequence[tuple[str, str]]) -> None:
    rows = {r["step"]: r for t in tracks for r in t.records if any(f"time/{name}_s" in r for name, _ in parts)}
    steps = sorted(rows)
    heights = np.array([[rows[step].get(f"time/{name}_s") or 0.0 for step in steps] for name, _ in parts])
    window = max(1, len(steps) // 40)
    smooth = [trailing_mean(row, window) for row in heights]
    ax.stackplot(steps, smooth, colors=[colour for _, colour in parts], linewidth=0)
    _title(ax, f"Step time{_averaged(window)}", "s")
    total = heights.sum(axis=0)
    top = min(float(total.max()), 1.6 * float(np.quantile(total, 0.95)))  # compilation makes the first step a spike
    ax.set_ylim(0, 1.45 * top or 1.0)
    if top < total.max():
        ax.annotate(
            f"peak {total.max():.3g} s", (0.99, 0.70), xycoords="axes fraction", ha="right", fontsize=9, color="#555555"
        )
    _key_fills(ax, parts)


def _stack_by_arm(ax: Axes, arms: Sequence[Track], parts: Sequence[tuple[str, str]]) -> None:
    """Areas of several arms would hide one another: their means lie side by side instead."""
    left = np.zeros(len(arms))
    for name, colour in parts:
        means = np.array([_mean(track, f"time/{name}_s") for track in arms])
        ax.barh(range(len(arms)), means, left=left, color=colour, height=0.42)
        left += means
    for row, track in enumerate(arms):
        ax.text(0, row - 0.25, _shorten(track.name, 40), va="bottom", fontsize=9.5)
    ax.set_yticks([])
    ax.set_ylim(len(arms) - 0.6, -0.7 - 0.35 * len(arms))  # room for the key on top
    ax.grid(axis="y", visible=False)
    _title(ax, "Mean step time", "")
    ax.set_xlabel("s")
    _key_fills(ax, parts)


def _share_steps(axes: dict[str, Axes], tracks: Sequence[Track], looks: Sequence[_Look]) -> None:
    several = sum(not track.is_trunk for track in tracks) > 1
    first, last = visible_steps(tracks)
    for name, ax in axes.items():
        if not ax.axison or (name == "time" and several):
            continue
        ax.set_xlim(first, last)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=9 if name == "entropy" else 5, integer=True))
        ax.set_xlabel("step")
        if name == "time":
            continue
        for track, look in zip(tracks, looks, strict=True):
            for span in track.spans():
                shade = {"reheat": look.shade, "sft": SFT_SHADE}.get(span.stage)
                if shade:
                    alpha = 0.22 if span.stage == "reheat" else 0.12
                    ax.axvspan(span.start, span.end, color=shade, alpha=alpha, linewidth=0, zorder=0)


def _legend(tracks: Sequence[Track], looks: Sequence[_Look]) -> list[Line2D | Patch]:
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=look.colour, linestyle=look.style, linewidth=2.5, label=_shorten(track.name, 32))
        for track, look in zip(tracks, looks, strict=True)
    ]
    stages = {span.stage for track in tracks for span in track.spans()}
    if "reheat" in stages:
        pairs = zip(tracks, looks, strict=True)
        shades = {look.shade for track, look in pairs if any(span.stage == "reheat" for span in track.spans())}
        shade = shades.pop() if len(shades) == 1 else "#777777"
        handles.append(Patch(color=shade, alpha=0.3, linewidth=0, label="reheat stage"))
    if "sft" in stages:
        handles.append(Patch(color=SFT_SHADE, alpha=0.2, linewidth=0, label="sft stage"))
    return handles


def _key_lines(ax: Axes, entries: Sequence[tuple[str, LineStyle, str]]) -> None:
    """Explains line styles and markers, which mean the same for every run."""
    handles = [
        Line2D([], [], color="#333333", linestyle=style, marker=marker, markersize=5.5, label=label)
        for label, style, marker in entries
    ]
    for handle in handles:
        if handle.get_marker() == "s":
            handle.set_markerfacecolor("white")
    ax.legend(handles=handles, loc="upper left", ncols=2, columnspacing=1.2, borderaxespad=0.2, fontsize=9.5)


def _key_fills(ax: Axes, parts: Sequence[tuple[str, str]]) -> None:
    handles = [Patch(color=colour, label=name, linewidth=0) for name, colour in parts]
    ax.legend(
        handles=handles, loc="upper left", ncols=3, handlelength=1, columnspacing=1.2, borderaxespad=0.2, fontsize=9.5
    )


def _title(ax: Axes, title: str, unit: str) -> None:
    ax.set_title(title)
    ax.set_ylabel(unit)


def _say_empty(ax: Axes, title: str, metrics: str) -> None:
    ax.set_title(title)
    ax.text(0.0, 0.9, f"not logged: {metrics}", transform=ax.transAxes, va="top", color="#666666", style="italic")
    ax.set_axis_off()


def _scale(ax: Axes, values: RealArray) -> None:
    """Fits the visible values; a log axis where they span much, as entropy does from warm start to collapse."""
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    if low <= 0 or high < 4 * low:
        margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        ax.set_ylim(low - margin, high + margin)
        return
    ax.set_yscale("log")
    ax.set_ylim(low / 1.3, high * 1.2)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _coincide(track: Track, first: str, second: str) -> bool:
    a, b = track.series(first), track.series(second)
    return all(len(x) == len(y) and np.allclose(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


def _mean(track: Track, metric: str) -> float:
    values = [r[metric] for r in track.records if r.get(metric) is not None]
    return float(np.mean(values)) if values else 0.0


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
