"""Several data sets of prompts as one, from which prompts are drawn by weight."""

from __future__ import annotations

import array
import bisect
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_reheat.config_data import DataConfig, TrainDataConfig, data_place
from megatron_reheat.data.dataset import PromptDataset, RenderedPrompts
from megatron_reheat.types import Prompt


class MixedPrompts(PromptDataset):
    """The parts' prompts one part after the other, each with the name of its part as `Prompt.source`.

    An epoch draws about as many prompts as there are. A part with the share w of the weights gives w of them, to within one
    prompt in all epochs together, and goes on in the next epoch where it stopped in this one: a small part of a large
    weight comes round several times in an epoch, and a large part of a small weight takes several epochs to come round.
    """

    identified_by = "the prompts themselves, their order or their weights (data.mix)"

    def __init__(self, parts: Mapping[str, RenderedPrompts], weights: Mapping[str, float] | None = None) -> None:
        """Without `weights`, each part gives as many prompts as it has."""
        super().__init__(())
        self.parts = dict(parts)
        self._names = list(parts)
        self._starts = list(accumulate(map(len, parts.values()), initial=0))
        of_part = {
            name: Fraction(len(part)) if weights is None else Fraction(weights[name]) for name, part in parts.items()
        }
        total = sum(of_part.values())
        # prompts of an epoch, exactly: sums of floats would drift from one platform to another
        self._shares = {name: weight / total * len(self) for name, weight in of_part.items()}

    def __len__(self) -> int:
        return self._starts[-1]

    def take(self, indices: Sequence[int]) -> list[Prompt]:
        by_part: dict[str, list[int]] = {name: [] for name in self.parts}
        for index in indices:
            name, row = self._place(index)
            by_part[name].append(row)
        taken = {name: iter(self.parts[name].take(rows)) for name, rows in by_part.items()}
        return [
            replace(next(taken[name]), index=i, source=name) for i, name in ((i, self._place(i)[0]) for i in indices)
        ]

    def epoch_length(self, epoch: int) -> int:
        return sum(len(rows) for rows in self._drawn(epoch).values())

    def epoch_order(self, seed: str, epoch: int, *, shuffle: bool) -> array.array[int]:
        """Unshuffled, the parts' own orders are interleaved evenly."""
        drawn = []
        for (name, walk), start in zip(self._drawn(epoch).items(), self._starts, strict=False):
            part = self.parts[name]
            for place, row in enumerate(_walked(part, f"{seed}/{name}", walk, shuffle=shuffle)):
                drawn.append(((2 * place + 1) / (2 * len(walk)), start + row))
        order = array.array("q", (index for _, index in sorted(drawn)))
        if shuffle:
            random.Random(f"{seed}/{epoch}").shuffle(order)
        return order

    @cached_property
    def fingerprint(self) -> int:
        of_parts = [f"{n} {self._shares[n]} {part.fingerprint}" for n, part in self.parts.items()]
        return zlib.crc32("\0".join(of_parts).encode())

    @cached_property
    def digests(self) -> NDArray[np.uint64]:
        return np.concatenate([part.digests for part in self.parts.values()])

    @property
    def longest(self) -> int:
        return max(part.longest for part in self.parts.values())

    def verifiers(self) -> Iterator[Mapping[str, Any]]:
        for part in self.parts.values():
            yield from part.verifiers()

    def hinted(self, index: int, solution: str | None = None) -> tuple[int, ...] | None:
        """Like `RenderedPrompts.hinted`."""
        name, row = self._place(index)
        return self.parts[name].hinted(row, solution)

    def values(self, key: str, place: str) -> Iterator[Any]:
        """Like `RenderedPrompts.values`."""
        for part in self.parts.values():
            yield from part.values(key, place)

    def describe(self) -> list[str]:
        lines = []
        for name, part in self.parts.items():
            first, *notes = part.describe()
            rounds = float(self._shares[name] / len(part))
            share = f"{float(self._shares[name] / len(self)):.1%} of the mix"
            lines += [f"{first}; {share}, each {rounds:.2f} times an epoch", *notes]
        return lines

    def _place(self, index: int) -> tuple[str, int]:
        number = bisect.bisect_right(self._starts, index) - 1
        return self._names[number], index - self._starts[number]

    def _drawn(self, epoch: int) -> dict[str, range]:
        """Of each part's own walk through its epochs, what this epoch takes."""
        return {name: range(int(share * epoch), int(share * (epoch + 1))) for name, share in self._shares.items()}


def _walked(part: PromptDataset, seed: str, walk: range, *, shuffle: bool) -> Iterator[int]:
    """The rows at `walk` in the part's epochs one after the other."""
    at = walk.start
    while at < walk.stop:
        round_, first = divmod(at, len(part))
        order = part.epoch_order(seed, round_, shuffle=shuffle)
        stop = min(len(order), first + walk.stop - at)
        yield from order[first:stop]
        at += stop - first


# the prompts of a run, each made of a record
RunPrompts = RenderedPrompts | MixedPrompts


def mixed(config: TrainDataConfig, load: Callable[[DataConfig, str], RenderedPrompts]) -> RunPrompts:
    """The prompts of the `data` section, of whose parts `load` reads one, given what errors call it."""
    if not config.mix:
        return load(config, data_place(""))
    parts = {name: load(part, data_place(name)) for name, part in config.mix.items()}
    weights = {name: part.weight for name, part in config.mix.items() if part.weight is not None}
    return MixedPrompts(parts, weights or None)
