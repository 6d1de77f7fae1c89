"""The pictures of a report, drawn without a display: all panels in one figure, and each by itself for the page."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image

from megatron_reheat.analysis.evaluations import suites_of
from megatron_reheat.analysis.look import DARK, DPI, LIGHT, Key, Scene, Theme, shorten, style
from megatron_reheat.analysis.panels import PANELS, draw_evaluation
from megatron_reheat.analysis.tracks import Track

SIZE_INCHES = (13.0, 11.0)
LAYOUT = [["entropy", "entropy", "reward"], ["evaluation", "length", "throughput"], ["mismatch", "grad", "time"]]

# A panel fills a phone's width, where a point is about a pixel; a wide one takes two columns and the gap between them,
# and is as high as its neighbours there.
PANEL_INCHES, WIDE_INCHES = (4.5, 3.2), (9.3, 3.2)
PANEL_DPI = 200
WIDE = "entropy"
COLOURS = 192


class Themed(Protocol):
    """What a panel is drawn from."""

    @property
    def theme(self) -> Theme:
        """The colours to draw in."""
        ...


ThemedT = TypeVar("ThemedT", bound=Themed)


@dataclass(frozen=True)
class Picture:
    """One PNG for each colour scheme."""

    light: bytes
    dark: bytes


@dataclass(frozen=True)
class Panel:
    """`wide` is the picture for screens with several columns, where it differs."""

    title: str
    picture: Picture
    wide: Picture | None


def draw_report(tracks: Sequence[Track]) -> bytes:
    """PNG of all panels, SIZE_INCHES x DPI pixels."""
    scene = Scene.of(tracks)
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.12)  # type: ignore[union-attr, call-arg]
        axes: dict[str, Axes] = figure.subplot_mosaic(LAYOUT, height_ratios=[1.2, 1.1, 1.0])
        for name, ax in axes.items():
            PANELS[name](ax, scene)
        handles = [_handle(key) for key in scene.legend()]
        longest = max(len(str(handle.get_label())) for handle in handles)
        columns = 6 if longest <= 18 else 4 if longest <= 28 else 3
        figure.legend(handles=handles, loc="outside upper left", ncols=columns, fontsize=10.5)
        return png(figure)


def draw_panels(tracks: Sequence[Track]) -> list[Panel]:
    """Each panel as pictures of its own, and one for every further suite; the page says which colour is whose."""
    scenes = [Scene.of(tracks, theme) for theme in (LIGHT, DARK)]
    drawings: dict[str, Callable[[Axes, Scene], None]] = dict(PANELS)
    drawings |= {f"evaluation of {suite}": partial(draw_evaluation, suite=suite) for suite in suites_of(tracks)[1:]}
    panels = []
    for name, draw in drawings.items():
        title, picture = draw_alone(draw, scenes, PANEL_INCHES)
        wide = draw_alone(draw, scenes, WIDE_INCHES)[1] if name == WIDE else None
        panels.append(Panel(title, picture, wide))
    return panels


def draw_alone(
    draw: Callable[[Axes, ThemedT], None], scenes: Sequence[ThemedT], size: tuple[float, float]
) -> tuple[str, Picture]:
    """Title and picture of one panel; the scenes are the same thing in light and in dark, `size` is in inches."""
    pictures = []
    for scene in scenes:
        with matplotlib.rc_context(style(scene.theme)):
            figure = Figure(figsize=size, dpi=PANEL_DPI, layout="constrained")
            ax = figure.subplots()
            draw(ax, scene)
            pictures.append(png(figure))
    return ax.get_title(loc="left"), Picture(*pictures)


def png(figure: Figure) -> bytes:
    """With a palette, at a third of the size: a panel has few colours, and a page has many panels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(buffer, format="png")
    return buffer.getvalue()


def _handle(key: Key) -> Line2D | Patch:
    label = shorten(key.label, 32)
    if key.style is None:
        return Patch(color=key.colour, alpha=0.3, linewidth=0, label=label)
    return Line2D([], [], color=key.colour, linestyle=key.style, linewidth=2.5, label=label)
