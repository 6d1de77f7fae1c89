"""What a comparison reports, made of the figures per token: means, quantiles, histograms and means by position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_reheat.microscope.displacement import BlockDisplacement
from megatron_reheat.microscope.tokens import TokenFigures

FORKING_SHARE = 0.2  # of the tokens, those of the highest entropy (arXiv 2506.01939)
HISTOGRAM_BINS = 40


@dataclass(frozen=True)
class Quantiles:
    """Values that tokens have (nearest rank)."""

    median: float
    q90: float
    q99: float
    maximum: float


@dataclass(frozen=True)
class Means:
    """Over some of the response tokens. Nats, but for shares: of the ten likeliest tokens that both have, and of taken tokens
    that were the likeliest one. Ranks count from 1."""

    num_tokens: int
    kl_ab: float
    kl_ba: float
    entropy_a: float
    entropy_b: float
    logprob_a: float
    logprob_b: float
    overlap: float
    rank_a: float
    rank_b: float
    first_a: float
    first_b: float

    @classmethod
    def of(cls, tokens: TokenFigures) -> Means:
        """Over all of `tokens`, taken in float64."""
        means = {name: _mean(values) for name, values in tokens._asdict().items()}
        firsts = (_mean(ranks == 1) for ranks in (tokens.rank_a, tokens.rank_b))
        return cls(len(tokens.kl_ab), **means, **dict(zip(("first_a", "first_b"), firsts, strict=True)))


@dataclass(frozen=True)
class PositionBin:
    """Tokens at the positions `first` to `last` of their responses, counted from 1."""

    first: int
    last: int
    means: Means


@dataclass(frozen=True)
class Histogram:
    """Counts of tokens between `edges` (nats), one fewer than those; the last edge belongs to the last bin."""

    edges: tuple[float, ...]
    a: tuple[int, ...]
    b: tuple[int, ...]


@dataclass(frozen=True)
class TokenSummary:
    """`forking` are the tokens where A's entropy is among the highest fifth, `rest` the others (None of a single token)."""

    all: Means
    forking: Means
    rest: Means | None
    kl_ab: Quantiles
    kl_ba: Quantiles
    positions: tuple[PositionBin, ...]
    entropy: Histogram


@dataclass(frozen=True)
class Comparison:
    """All of it. `cka` is by reading (`states.reading_names`); it and `displacement` are None where the models have other
    shapes. `sources` are the files of the probe text."""

    a: str
    b: str
    reference: str | None
    sources: tuple[str, ...]
    num_sequences: int
    num_cka_tokens: int
    tokens: TokenSummary
    cka: dict[str, float | None] | None
    displacement: tuple[BlockDisplacement, ...] | None
    notes: tuple[str, ...]


def summarize(tokens: TokenFigures, positions: Tensor) -> TokenSummary:
    """
    Args:
        positions: [T] int64 of each token in its response, from 1.
    """
    count = len(positions)
    num_forking = math.ceil(FORKING_SHARE * count)
    forking = torch.zeros(count, dtype=torch.bool)
    forking[tokens.entropy_a.topk(num_forking).indices] = True
    return TokenSummary(
        all=Means.of(tokens),
        forking=Means.of(tokens.at(forking)),
        rest=Means.of(tokens.at(~forking)) if num_forking < count else None,
        kl_ab=_quantiles(tokens.kl_ab),
        kl_ba=_quantiles(tokens.kl_ba),
        positions=tuple(_by_position(tokens, positions)),
        entropy=_histogram(tokens.entropy_a, tokens.entropy_b),
    )


def positions_of(lengths: Sequence[int]) -> Tensor:
    """[T] of responses one after the other."""
    return torch.cat([torch.arange(1, length + 1) for length in lengths])


def _by_position(tokens: TokenFigures, positions: Tensor) -> list[PositionBin]:
    """Bins that double: 1, 2-3, 4-7, ..., the last up to the longest response's end."""
    bins, longest = [], int(positions.max())
    first = 1
    while first <= longest:
        last = min(2 * first - 1, longest)
        inside = (first <= positions) & (positions <= last)
        bins.append(PositionBin(first, last, Means.of(tokens.at(inside))))
        first *= 2
    return bins


def _histogram(a: Tensor, b: Tensor) -> Histogram:
    # a range of no width has no bins
    top = max(float(a.max()), float(b.max())) or 1.0
    counts, edges = [], torch.linspace(0, top, HISTOGRAM_BINS + 1, dtype=torch.float64)
    for values in (a, b):
        # rounding may leave an entropy of zero a hair below it
        bins = torch.histogram(values.double().clamp(0, top), edges).hist
        counts.append(tuple(int(n) for n in bins))
    return Histogram(tuple(edges.tolist()), *counts)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _quantiles(values: Tensor) -> Quantiles:
    """Nearest rank, as values of tokens that exist."""
    ordered = values.double().sort().values.tolist()
    median, q90, q99 = (ordered[math.ceil(q * len(ordered)) - 1] for q in (0.5, 0.9, 0.99))
    return Quantiles(median, q90, q99, ordered[-1])
