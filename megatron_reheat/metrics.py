"""Metrics that know their reduction, so that micro-batches and ranks can be merged in any grouping.

A mean is carried as (total, count) until the very end: two finished averages have no way to meet, because
`reduced()` returns plain floats and `merge` takes sums only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

Reduction = Literal["mean", "sum", "max"]


@dataclass(frozen=True)
class _Entry:
    reduction: Reduction
    value: float
    count: float = 1.0


class MetricSums:
    """Accumulates metrics over the micro-batches of one rank; `merge` then joins ranks.

    Names have slashes (`policy/clip_fraction`). One name has one reduction: a second one raises ValueError.
    Merging gives the same result in any order, up to float rounding; NaN wins over every number.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def add_mean(self, name: str, total: float, count: float) -> None:
        """Adds a SUM over `count` items (tokens, sequences), never an average.

        A name whose counts stay at 0 is left out of `reduced()`.

        Raises:
            ValueError: `count` is negative or not finite.
        """
        if not 0 <= count < math.inf:
            raise ValueError(f"metric {name!r}: count must be a finite number of items, not {count}")
        self._add(name, _Entry("mean", float(total), float(count)))

    def add_sum(self, name: str, value: float) -> None:
        """Adds to the name's total over all micro-batches and ranks."""
        self._add(name, _Entry("sum", float(value)))

    def add_max(self, name: str, value: float) -> None:
        """Keeps the largest over all micro-batches and ranks."""
        self._add(name, _Entry("max", float(value)))

    def merge(self, other: MetricSums) -> None:
        """Takes over what another micro-batch or rank has accumulated; `other` is unchanged.

        Ranks that hold copies of the same tokens (tensor parallelism) must contribute once: the caller picks one.
        """
        for name, entry in other._entries.items():
            self._add(name, entry)

    def reduced(self) -> dict[str, float]:
        """Final values by name, in alphabetical order."""
        return {
            name: entry.value / entry.count if entry.reduction == "mean" else entry.value
            for name, entry in sorted(self._entries.items())
            if entry.count > 0
        }

    def to_wire(self) -> dict[str, list[Any]]:
        """`{name: [reduction, value, count]}`: plain objects for an all-gather or JSON."""
        return {name: [e.reduction, e.value, e.count] for name, e in self._entries.items()}

    @classmethod
    def from_wire(cls, wire: Mapping[str, list[Any]]) -> MetricSums:
        """Inverse of `to_wire`.

        Raises:
            ValueError: an entry is not `[reduction, value, count]`, e.g. because finished averages were passed.
        """
        sums = cls()
        for name, entry in wire.items():
            if not isinstance(entry, list | tuple) or len(entry) != 3 or entry[0] not in get_args(Reduction):
                raise ValueError(f"metric {name!r}: expected [reduction, value, count] from to_wire(), got {entry!r}")
            sums._add(name, _Entry(cast(Reduction, entry[0]), float(entry[1]), float(entry[2])))
        return sums

    @classmethod
    def from_wires(cls, wires: Iterable[Mapping[str, list[Any]]]) -> MetricSums:
        """Merges what an all-gather returned; in rank order, so that every rank gets the same bits."""
        return cls.merged(cls.from_wire(wire) for wire in wires)

    @classmethod
    def merged(cls, parts: Iterable[MetricSums]) -> MetricSums:
        """All `parts` in one, in their order; they stay as they are."""
        total = cls()
        for part in parts:
            total.merge(part)
        return total

    def _add(self, name: str, new: _Entry) -> None:
        old = self._entries.get(name)
        if old is None:
            self._entries[name] = new
            return
        if old.reduction != new.reduction:
            raise ValueError(f"metric {name!r} is reduced by {old.reduction} and by {new.reduction}; rename one")
        if new.reduction == "mean":
            self._entries[name] = replace(old, value=old.value + new.value, count=old.count + new.count)
        else:
            self._entries[name] = replace(old, value=_COMBINE[new.reduction](old.value, new.value))


def _max(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)  # max(1, nan) and max(nan, 1) differ


_COMBINE: dict[str, Callable[[float, float], float]] = {"sum": lambda a, b: a + b, "max": _max}
