"""How figures look, in light and in dark. The colours of runs are Okabe and Ito's, safe for colour-blind readers, and
lighter ones of the same hues on dark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_reheat.analysis.tracks import Track

DPI = 140

LineStyle = str | tuple[float, tuple[float, ...]]

ARM_STYLES: tuple[LineStyle, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)))  # a second and third round of colours
TIME_PARTS = ("rollout", "reward", "score", "update", "sync", "other")


@dataclass(frozen=True)
class Theme:
    """`time_parts` are the colours of TIME_PARTS. The page's CSS variables are made of the same fields."""

    background: str
    surface: str
    text: str
    muted: str
    line: str
    good: str
    bad: str
    trunk: str
    arms: tuple[str, ...]
    reheat_shade: str
    sft_shade: str
    time_parts: tuple[str, ...]


LIGHT = Theme(
    background="#ffffff",
    surface="#f5f6f8",
    text="#1f2328",
    muted="#59636e",
    line="#e1e4e8",
    good="#116b3c",
    bad="#b42318",
    trunk="#4d4d4d",
    arms=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"),
    reheat_shade="#e69f00",
    sft_shade="#8c8c8c",
    time_parts=("#0072b2", "#cc79a7", "#56b4e9", "#009e73", "#e69f00", "#bbbbbb"),
)
DARK = Theme(
    background="#14171c",
    surface="#1e232a",
    text="#e3e6ea",
    muted="#9aa4af",
    line="#323941",
    good="#5fd39a",
    bad="#ff8d80",
    trunk="#b5b9be",
    arms=("#4c9dec", "#f08346", "#2bbd93", "#e29cc6", "#9bdcf7", "#f0c04e"),
    reheat_shade="#e6a83a",
    sft_shade="#9a9a9a",
    time_parts=("#4c9dec", "#e29cc6", "#9bdcf7", "#2bbd93", "#f0c04e", "#80868c"),
)


@dataclass(frozen=True)
class Look:
    """How one run's lines are drawn, in matplotlib's terms."""

    colour: str
    style: LineStyle
    shade: str  # of its reheat stages: with several arms the shade says whose


@dataclass(frozen=True)
class Key:
    """What a colour means; `style` is that of a line, None for a shade."""

    label: str
    colour: str
    style: LineStyle | None


@dataclass(frozen=True)
class Scene:
    """What every panel is drawn from."""

    tracks: Sequence[Track]
    looks: Sequence[Look]
    theme: Theme

    @classmethod
    def of(cls, tracks: Sequence[Track], theme: Theme = LIGHT) -> Scene:
        """Arms take the colours of `theme` in turn, in each round with the next of ARM_STYLES; all trunks have one."""
        num_arms = sum(not track.is_trunk for track in tracks)
        looks: list[Look] = []
        arm = 0
        for track in tracks:
            if track.is_trunk:
                looks.append(Look(theme.trunk, "-", theme.reheat_shade))
                continue
            colour = theme.arms[arm % len(theme.arms)]
            style = ARM_STYLES[arm // len(theme.arms) % len(ARM_STYLES)]
            looks.append(Look(colour, style, theme.reheat_shade if num_arms == 1 else colour))
            arm += 1
        return cls(tracks, looks, theme)

    @property
    def has_several_arms(self) -> bool:
        """Trunks are not counted."""
        return sum(not track.is_trunk for track in self.tracks) > 1

    def legend(self) -> list[Key]:
        """The runs, and the stages that are shaded."""
        keys = [Key(track.name, look.colour, look.style) for track, look in self]
        stages = {span.stage for track in self.tracks for span in track.spans()}
        if "reheat" in stages:
            shades = {look.shade for track, look in self if any(span.stage == "reheat" for span in track.spans())}
            if len(shades) == 1:
                keys.append(Key("reheat stage", shades.pop(), None))
            else:
                keys.append(Key("reheat stage (run's colour)", self.theme.muted, None))
        if "sft" in stages:
            keys.append(Key("sft stage", self.theme.sft_shade, None))
        return keys

    def __iter__(self) -> Iterator[tuple[Track, Look]]:
        return zip(self.tracks, self.looks, strict=True)


def style(theme: Theme = LIGHT) -> dict[str, Any]:
    """Settings of matplotlib."""
    return {
        "font.size": 10.5,
        "text.color": theme.text,
        "figure.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.text,
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "grid.color": theme.line,
        "grid.linewidth": 0.8,
        "lines.linewidth": 1.7,
        "lines.solid_joinstyle": "round",
        "legend.frameon": False,
        "legend.fontsize": 10,
        "text.parse_math": False,  # a run called a$b$c is not a formula
    }


def shorten(text: str, length: int) -> str:
    """At most `length` characters; what is cut off becomes an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"
