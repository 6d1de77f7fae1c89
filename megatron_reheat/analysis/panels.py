"""The panels of a report: one question about the runs each. A panel without data says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from megatron_reheat.analysis.evaluations import suites_of
from megatron_reheat.analysis.look import TIME_PARTS, LineStyle, Look, Scene, shorten
from megatron_reheat.analysis.tracks import RealArray, Track, number, trailing_mean, visible_steps

_WORDS = {"reward/accuracy": "accuracy", "reward/mean": "reward"}
# keys of the controller, the lower threshold first
THRESHOLDS = ("collapse_below", "reheat_to")
OF_COOLING = ("cool_to", "cool_above")


def draw_entropy(ax: Axes, scene: Scene) -> None:
    """As it was logged, not smoothed, with the thresholds of the runs' controllers."""
    thresholds = {
        (value, key)
        for track in scene.tracks
        for key in (OF_COOLING if track.setting("controller", "action") == "cool" else THRESHOLDS)
        if (value := number(track.setting("controller", key))) is not None
    }
    levels = [value for value, _ in thresholds]
    draw_lines(ax, scene, "entropy/mean", "Entropy of training rollouts", "nats", smooth=False, levels=levels)
    if not any(track.has("entropy/mean") for track in scene.tracks):
        return
    for value, key in sorted(thresholds):
        ax.axhline(value, color=scene.theme.text, linestyle=(0, (4, 3)), linewidth=1.1)
        # On the left, where a run begins with high entropy; the lower threshold is labelled below its line.
        below = key in (THRESHOLDS[0], OF_COOLING[0])
        ax.annotate(
            f"{key.replace('_', ' ')} {value:g}",
            (0.008, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, -4 if below else 3),
            textcoords="offset points",
            va="top" if below else "bottom",
            fontsize=9.5,
        )


def draw_reward(ax: Axes, scene: Scene) -> None:
    """The reward has a line of its own where it is not the accuracy."""
    names = [m for m in ("reward/accuracy", "reward/mean") if any(track.has(m) for track in scene.tracks)]
    if not names:
        _say_empty(ax, scene, "Training accuracy and reward", "reward/accuracy, reward/mean")
        return
    same = len(names) == 2 and all(_coincide(track, *names) for track in scene.tracks)
    drawn = names[:1] if same else names
    windows = [_plot_smoothed(ax, scene, name, ":" if i else None) for i, name in enumerate(drawn)]
    what = "accuracy (= reward)" if same else " and ".join(_WORDS[name] for name in names)
    _title(ax, f"Training {what}", "", windows[0])
    if len(drawn) == 2:
        ax.margins(y=0.15)
        _key_lines(ax, scene, [("accuracy", "-", ""), ("reward", ":", "")])
    _share_steps(ax, scene)


def draw_evaluation(ax: Axes, scene: Scene, suite: str | None = None) -> None:
    """avg@k and pass@k with their 95% intervals; of the first suite, which is `eval.data` where there is one."""
    if suite is None:
        suite = next(iter(suites_of(scene.tracks)), "")
    prefix = f"eval/{suite}/" if suite else "eval/"
    title = f"Held-out: {shorten(suite, 24)}" if suite else "Held-out evaluation"
    logged = [
        track for track in scene.tracks if any(track.has(f"{prefix}{name}") for name in ("avg_at_k", "pass_at_k"))
    ]
    samples = {track.num_samples(suite) for track in logged} - {None}
    k = str(samples.pop()) if len(samples) == 1 else "k"
    kinds: list[tuple[str, str, LineStyle, str]] = [
        (f"{prefix}avg_at_k", f"avg@{k}", "-", "o"),
        (f"{prefix}pass_at_k", f"pass@{k}", (0, (3, 2)), "s"),
    ]
    if not logged:
        _say_empty(ax, scene, title, f"{prefix}avg_at_k, {prefix}pass_at_k")
        return
    for metric, _, style, marker in kinds:
        for track, look in scene:
            fill = look.colour if marker == "o" else scene.theme.background
            _plot_intervals(ax, track, look, metric)
            ax.plot(
                *track.series(metric), color=look.colour, linestyle=style, marker=marker, markersize=5,
                markerfacecolor=fill, linewidth=1.5,
            )  # fmt: skip
    _title(ax, title, "")
    ax.margins(y=0.18)  # room for the key
    _key_lines(ax, scene, [(label, style, marker) for _, label, style, marker in kinds])
    _share_steps(ax, scene)


def draw_time(ax: Axes, scene: Scene) -> None:
    """Seconds by part of a step: over the steps, or each arm's means where there are several."""
    parts = [
        (name, colour)
        for name, colour in zip(TIME_PARTS, scene.theme.time_parts, strict=True)
        if any(track.has(f"time/{name}_s") for track in scene.tracks)
    ]
    if not parts:
        _say_empty(ax, scene, "Step time", "time/*_s")
    elif scene.has_several_arms:
        _stack_by_arm(ax, [track for track in scene.tracks if not track.is_trunk], parts)
    else:
        _stack_over_steps(ax, scene, parts)


def draw_lines(
    ax: Axes,
    scene: Scene,
    metric: str,
    title: str,
    unit: str,
    *,
    smooth: bool = True,
    levels: Sequence[float] = (),
) -> None:
    """One metric over steps. `levels` are values that stay in view whatever the data."""
    if not any(track.has(metric) for track in scene.tracks):
        _say_empty(ax, scene, title, metric)
        return
    window = 1
    if smooth:
        window = _plot_smoothed(ax, scene, metric)
    else:
        for track, look in scene:
            _plot(ax, track.series(metric), look)
    _title(ax, title, unit, window)
    first, last = visible_steps(scene.tracks)
    shown = [v[(s >= first) & (s <= last)] for s, v in (track.series(metric) for track in scene.tracks)]
    _scale(ax, np.concatenate([*(v[np.isfinite(v)] for v in shown), np.asarray(levels, dtype=np.float64)]))
    _share_steps(ax, scene)


def _of(metric: str, title: str, unit: str) -> Callable[[Axes, Scene], None]:
    return lambda ax, scene: draw_lines(ax, scene, metric, title, unit)


PANELS: dict[str, Callable[[Axes, Scene], None]] = {
    "entropy": draw_entropy,
    "reward": draw_reward,
    "evaluation": draw_evaluation,
    "length": _of("response/length_mean", "Response length", "tokens"),
    "throughput": _of("throughput/tokens_per_s", "Throughput", "tokens/s"),
    "time": draw_time,
    "mismatch": _of("rollout/mismatch_kl", "Mismatch KL", "nats"),
    "grad": _of("optimizer/grad_norm", "Gradient norm", ""),
}


def _plot_smoothed(ax: Axes, scene: Scene, metric: str, style: LineStyle | None = None) -> int:
    """Running means over faint raw values; returns the number of steps averaged."""
    window = max(1, max(len(track.series(metric)[0]) for track in scene.tracks) // 40)
    for track, look in scene:
        if window > 1:
            ax.plot(*track.series(metric), color=look.colour, alpha=0.2, linewidth=0.8)
        _plot(ax, track.series(metric, window), look, style)
    return window


def _plot(ax: Axes, series: tuple[RealArray, RealArray], look: Look, style: LineStyle | None = None) -> None:
    marker = "o" if len(series[0]) == 1 else ""  # a line of one point would be invisible
    ax.plot(*series, color=look.colour, linestyle=style or look.style, marker=marker)


def _plot_intervals(ax: Axes, track: Track, look: Look, metric: str) -> None:
    ends = [(r["step"], number(r.get(f"{metric}_low")), number(r.get(f"{metric}_high"))) for r in track.records]
    drawn = [(step, low, high) for step, low, high in ends if low is not None and high is not None]
    if drawn:
        ax.vlines(*zip(*drawn, strict=True), color=look.colour, linewidth=3.5, alpha=0.3)


def _stack_over_steps(ax: Axes, scene: Scene, parts: Sequence[tuple[str, str]]) -> None:
    rows = {r["step"]: r for t in scene.tracks for r in t.records if any(f"time/{name}_s" in r for name, _ in parts)}
    steps = sorted(rows)
    heights = np.array([[number(rows[step].get(f"time/{name}_s")) or 0.0 for step in steps] for name, _ in parts])
    window = max(1, len(steps) // 40)
    smooth = [trailing_mean(row, window) for row in heights]
    ax.stackplot(steps, smooth, colors=[colour for _, colour in parts], linewidth=0)
    total = heights.sum(axis=0)
    top = min(float(total.max()), 1.6 * float(np.quantile(total, 0.95)))  # compilation makes the first step a spike
    ax.set_ylim(0, 1.45 * top or 1.0)
    _title(ax, f"Step time, peak {total.max():.3g} s" if top < total.max() else "Step time", "s", window)
    _key_fills(ax, parts)
    _share_steps(ax, scene, shade=False)


def _stack_by_arm(ax: Axes, arms: Sequence[Track], parts: Sequence[tuple[str, str]]) -> None:
    """Areas of several arms would hide one another: their means lie side by side instead."""
    left = np.zeros(len(arms))
    for name, colour in parts:
        means = np.array([np.mean(track.values(f"time/{name}_s") or [0.0]) for track in arms])
        ax.barh(range(len(arms)), means, left=left, color=colour, height=0.42)
        left += means
    for row, track in enumerate(arms):
        ax.text(0, row - 0.25, shorten(track.name, 40), va="bottom", fontsize=9.5, clip_on=True)
    ax.set_yticks([])
    ax.set_ylim(len(arms) - 0.6, -0.7 - 0.35 * len(arms))  # room for the key on top
    ax.grid(axis="y", visible=False)
    _title(ax, "Mean step time", "")
    ax.set_xlabel("s")
    _key_fills(ax, parts)


def _share_steps(ax: Axes, scene: Scene, *, shade: bool = True) -> None:
    """The same steps in every panel, with the stages that are not RL as shades."""
    ax.set_xlim(*visible_steps(scene.tracks))
    ax.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
    ax.set_xlabel("step")
    for track, look in scene if shade else ():
        for span in track.spans():
            colour = {"reheat": look.shade, "sft": scene.theme.sft_shade}.get(span.stage)
            if colour:
                alpha = 0.22 if span.stage == "reheat" else 0.12
                ax.axvspan(span.start, span.end, color=colour, alpha=alpha, linewidth=0, zorder=0)


def _key_lines(ax: Axes, scene: Scene, entries: Sequence[tuple[str, LineStyle, str]]) -> None:
    """Explains line styles and markers, which mean the same for every run."""
    handles = [
        Line2D([], [], color=scene.theme.text, linestyle=style, marker=marker, markersize=5.5, label=label)
        for label, style, marker in entries
    ]
    for handle in handles:
        if handle.get_marker() == "s":
            handle.set_markerfacecolor(scene.theme.background)
    ax.legend(handles=handles, loc="upper left", ncols=2, columnspacing=1.2, borderaxespad=0.2, fontsize=9.5)


def _key_fills(ax: Axes, parts: Sequence[tuple[str, str]]) -> None:
    handles = [Patch(color=colour, label=name, linewidth=0) for name, colour in parts]
    ax.legend(
        handles=handles, loc="upper left", ncols=3, handlelength=1, columnspacing=1.2, borderaxespad=0.2, fontsize=9.5
    )


def _title(ax: Axes, title: str, unit: str, window: int = 1) -> None:
    """What is averaged stands at the axis: a title with it would not fit a phone."""
    ax.set_title(title)
    ax.set_ylabel(", ".join(filter(None, [unit, f"{window}-step mean" if window > 1 else ""])))


def _say_empty(ax: Axes, scene: Scene, title: str, metrics: str) -> None:
    ax.set_title(title)
    text = f"not logged: {metrics}".replace(", ", ",\n")
    ax.text(0.0, 0.9, text, transform=ax.transAxes, va="top", color=scene.theme.muted, style="italic")
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
