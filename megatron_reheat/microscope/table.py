"""A comparison on a terminal, within 80 columns."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from megatron_reheat.analysis.rounds import OVERALL
from megatron_reheat.microscope.displacement import HEAD_BLOCK, BlockDisplacement
from megatron_reheat.microscope.figures import Comparison, Means, TokenSummary

WIDTH = 80
# what a row is called, and the field of Means
ROWS = (
    ("KL(A || B), nats", "kl_ab"),
    ("KL(B || A), nats", "kl_ba"),
    ("entropy of A, nats", "entropy_a"),
    ("entropy of B, nats", "entropy_b"),
    ("top-10 overlap", "overlap"),
    ("taken token's rank, A", "rank_a"),
    ("taken token's rank, B", "rank_b"),
    ("share ranked first, A", "first_a"),
    ("share ranked first, B", "first_b"),
)


def shown(value: float | None) -> str:
    """Four significant digits, a dash for what is not there."""
    return "-" if value is None else f"{value:.4g}"


def reading(block: str, cka: float | None) -> str:
    """The head's output are the predictions, which have figures of their own."""
    return "" if block in (HEAD_BLOCK, OVERALL) else shown(cka)


def columns(tokens: TokenSummary) -> dict[str, Means]:
    """By title; without the rest where all tokens are forking ones."""
    parts = {"all tokens": tokens.all, "forking": tokens.forking, "rest": tokens.rest}
    return {name: means for name, means in parts.items() if means is not None}


def blocks(comparison: Comparison) -> list[tuple[str, float | None, BlockDisplacement | None]]:
    """(block, CKA of what it puts out, displacement), in the order in which a token goes through them."""
    cka = comparison.cka or {}
    moved = {block.block: block for block in comparison.displacement or ()}
    return [(name, cka.get(name), moved.get(name)) for name in dict.fromkeys([*cka, *moved])]


def print_comparison(comparison: Comparison) -> None:
    """On stdout, in WIDTH columns at most; names, counts and notes may be longer."""
    console = Console(markup=False, highlight=False)
    console.width = min(console.width, WIDTH)
    named = {"A": comparison.a, "B": comparison.b, "C": comparison.reference}
    for letter, name in named.items():
        if name is not None:
            console.print(f"{letter}: {name}", soft_wrap=True)
    console.print(
        f"{comparison.tokens.all.num_tokens:,} tokens of {comparison.num_sequences:,} responses, from "
        f"{comparison.sources[0]}{' and others' if len(comparison.sources) > 1 else ''}",
        soft_wrap=True,
    )
    console.print(_token_table(comparison.tokens))
    if comparison.cka is not None or comparison.displacement is not None:
        console.print(_block_table(comparison))
    for note in comparison.notes:
        console.print(f"note: {note}", soft_wrap=True)


def _token_table(tokens: TokenSummary) -> Table:
    parts = columns(tokens)
    table = Table(title="Predictions (means over response tokens)", title_justify="left")
    table.add_column("")
    for name in parts:
        table.add_column(name, justify="right")
    table.add_row("tokens", *(f"{means.num_tokens:,}" for means in parts.values()))
    for name, field in ROWS:
        table.add_row(name, *(shown(getattr(means, field)) for means in parts.values()))
    return table


def _block_table(comparison: Comparison) -> Table:
    table = Table(title="Layers", title_justify="left")
    table.add_column("")
    for name in ("linear CKA", "moved, relative", *(["cosine with C - A"] if comparison.reference else [])):
        table.add_column(name, justify="right")
    for name, cka, block in blocks(comparison):
        moved = (None, None) if block is None else (block.relative, block.cosine)
        table.add_row(name, reading(name, cka), *map(shown, moved[: len(table.columns) - 2]))
    return table
