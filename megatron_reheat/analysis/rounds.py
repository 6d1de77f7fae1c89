"""What `reheat compare RUN` found of a run's rounds, read back for the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_reheat.run_folder import RunFolder

OVERALL = "all"  # what the displacement of all weights together is called in a comparison


@dataclass(frozen=True)
class ComparedRound:
    """A row of the page's table, and its picture as PNG. A is before the round, B after it; `moved` is relative to |A|."""

    number: int
    num_tokens: int
    kl_ab: float
    kl_ba: float
    entropy_a: float
    entropy_b: float
    overlap: float
    lowest_cka: float | None
    moved: float | None
    picture: bytes


def compared_rounds(run: RunFolder) -> Iterator[ComparedRound]:
    """In order; a round whose comparison is not there, or cannot be read, is left out."""
    for number in run.rounds:
        folder = run.compared_borders(number)
        try:
            tree = json.loads((folder / "compare.json").read_text())
            yield _round(number, tree, (folder / "compare.png").read_bytes())
        except (OSError, ValueError, KeyError, TypeError):
            continue


def _round(number: int, tree: dict[str, Any], picture: bytes) -> ComparedRound:
    means = tree["tokens"]["all"]
    cka = [value for value in (tree["cka"] or {}).values() if value is not None]
    moved = {block["block"]: block["relative"] for block in tree["displacement"] or ()}
    names = ("num_tokens", "kl_ab", "kl_ba", "entropy_a", "entropy_b", "overlap")
    return ComparedRound(
        number,
        **{name: means[name] for name in names},
        lowest_cka=min(cka, default=None),
        moved=moved.get(OVERALL),
        picture=picture,
    )
