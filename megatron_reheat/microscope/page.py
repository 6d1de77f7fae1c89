"""What `reheat compare` writes: all figures as JSON, one picture, and one self-contained page."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_reheat.analysis.look import DARK, LIGHT, Key
from megatron_reheat.analysis.page import page_template
from megatron_reheat.analysis.rounds import OVERALL
from megatron_reheat.errors import ConfigError, ReheatError
from megatron_reheat.microscope import table
from megatron_reheat.microscope.figures import Comparison
from megatron_reheat.run_folder import write_atomically

TEMPLATE = Path(__file__).parent / "compare.html.j2"
COMMAND = "reheat compare"  # by which compare.json is known as ours


@dataclass(frozen=True)
class ComparePaths:
    """The files of a comparison."""

    json: Path
    png: Path
    html: Path

    @classmethod
    def under(cls, folder: Path) -> ComparePaths:
        """As they are called in `folder`, whether they exist or not."""
        return cls(*(folder / f"compare.{kind}" for kind in ("json", "png", "html")))


def check_out(folder: Path) -> None:
    """An earlier comparison is replaced, and nothing else.

    Raises:
        ConfigError: `folder` is a file, or has a file of one of our names that is not ours.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out: {folder} is not a folder; name another one")
    paths = ComparePaths.under(folder)
    there = [path for path in (paths.json, paths.png, paths.html) if path.exists()]
    if there and not _is_ours(paths.json):
        raise ConfigError(
            f"--out: {there[0]} exists and is not by {COMMAND}; nothing is overwritten: name another folder"
        )


def write_comparison(comparison: Comparison, folder: Path) -> ComparePaths:
    """
    Raises:
        ReheatError: the folder cannot be written.
    """
    from megatron_reheat.microscope.drawing import draw_comparison

    paths = ComparePaths.under(folder)
    tree = {"command": COMMAND, **asdict(comparison)}
    png, page = draw_comparison(comparison), _page(comparison)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(paths.json, (json.dumps(tree, indent=1) + "\n").encode())
        write_atomically(paths.png, png)
        # a path may hold bytes that no encoding has
        write_atomically(paths.html, page.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise ReheatError(f"cannot write the comparison to {folder}: {error.strerror}; choose another folder") from None
    return paths


def _page(comparison: Comparison) -> str:
    from megatron_reheat.microscope.drawing import draw_panels

    keys = [[Key(letter, theme.arms[i], "-") for i, letter in enumerate("AB")] for theme in (LIGHT, DARK)]
    names = {"A": comparison.a, "B": comparison.b, "C": comparison.reference}
    return page_template(TEMPLATE, {"shown": table.shown}).render(
        title="A against B: what differs",
        names={letter: name for letter, name in names.items() if name is not None},
        comparison=comparison,
        themes={"light": LIGHT, "dark": DARK},
        keys=list(zip(*keys, strict=True)),
        panels=draw_panels(comparison),
        columns=table.columns(comparison.tokens),
        rows=table.ROWS,
        blocks=table.blocks(comparison),
        reading=table.reading,
        overall=OVERALL,
    )


def _is_ours(path: Path) -> bool:
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(tree, dict) and tree.get("command") == COMMAND
