"""A data set of prompts: a few numbers of each stay in memory, and a prompt is made again whenever it is drawn."""

from __future__ import annotations

import array
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_reheat.data.fields import required
from megatron_reheat.data.records import Records
from megatron_reheat.data.rendering import Renderer
from megatron_reheat.errors import ConfigError, ReheatError
from megatron_reheat.types import Prompt

BATCH = 1000  # prompts that are made in one go


@dataclass(frozen=True)
class Counts:
    """What became of the records: too long and skipped; equal to an earlier one, and of these with another answer; left out
    by `without`."""

    records: int = 0
    skipped: int = 0
    duplicates: int = 0
    other_answers: int = 0
    overlapping: int = 0


class PromptDataset:
    """Prompts in a fixed order; `dataset[i].index == i`."""

    identified_by = "the prompts themselves"  # what the fingerprint is of

    def __init__(self, prompts: Sequence[Prompt], counts: Counts = Counts(), notes: Sequence[str] = ()) -> None:
        self._prompts = prompts
        self.counts = counts
        self.notes = notes  # what a reader of the recipe may not expect of the prompts

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.take([range(len(self))[index]])[0]

    def __iter__(self) -> Iterator[Prompt]:
        for start in range(0, len(self), BATCH):
            yield from self.take(range(start, min(start + BATCH, len(self))))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, PromptDataset)
            and (len(self), self.counts) == (len(other), other.counts)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    def take(self, indices: Sequence[int]) -> list[Prompt]:
        """
        Raises:
            ReheatError: their file was changed while the run reads it.
        """
        return [self._prompts[i] for i in indices]

    @property
    def num_skipped(self) -> int:
        """Records left out because their prompt is too long."""
        return self.counts.skipped

    @property
    def num_overlapping(self) -> int:
        """Prompts left out by `without`."""
        return self.counts.overlapping

    @property
    def num_duplicates(self) -> int:
        """Records that make the same prompt as an earlier one, left out or not."""
        return self.counts.duplicates

    @cached_property
    def fingerprint(self) -> int:
        """CRC-32 of the prompt texts in order: a changed dataset does not pass for the old one on resume."""
        crc = 0
        for prompt in self:
            crc = extend_fingerprint(crc, prompt.text)
        return crc

    @cached_property
    def digests(self) -> NDArray[np.uint64]:
        """[P] of the prompts' texts."""
        return np.fromiter((digest_of(prompt.text) for prompt in self), np.uint64, len(self))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt.token_ids) for prompt in self)

    def verifiers(self) -> Iterator[Mapping[str, Any]]:
        """What graders get for each prompt, without making the prompt."""
        return (prompt.verifier for prompt in self._prompts)

    def epoch_length(self, epoch: int) -> int:
        """How many prompts are drawn in an epoch."""
        return len(self)

    def epoch_order(self, seed: str, epoch: int, *, shuffle: bool) -> array.array[int]:
        """Which prompts, in the order in which an epoch draws them: [`epoch_length`], a permutation if `shuffle` is set."""
        order = array.array("q", range(len(self)))  # 8 bytes a prompt, a list takes 40
        if shuffle:
            # Python's own generator: its shuffle is the same on every platform and in every release so far.
            random.Random(f"{seed}/{epoch}").shuffle(order)
        return order

    def describe(self) -> list[str]:
        """What a run's log tells of its data, a line each."""
        return []

    def without(self, other: PromptDataset, section: str = "eval.data") -> PromptDataset:
        """These prompts less those whose text is in `other`, renumbered: evaluation data, which the recipe's `section` names,
        without the training data.

        Raises:
            ConfigError: nothing would be left.
        """
        kept = np.flatnonzero(~np.isin(self.digests, other.digests))
        if not len(kept):
            raise ConfigError(
                f"all {len(self)} evaluation prompts are in the training data too; change {section}.seed, "
                f"{section}.split or {section}.path"
            )
        overlapping = self.counts.overlapping + len(self) - len(kept)
        return self._select(kept, replace(self.counts, overlapping=overlapping))

    def _select(self, indices: NDArray[np.int64], counts: Counts) -> PromptDataset:
        kept = (self._prompts[i] for i in indices)
        return PromptDataset([replace(prompt, index=i) for i, prompt in enumerate(kept)], counts, self.notes)


@dataclass(frozen=True)
class Columns:
    """[P] each, 20 bytes a prompt: the number of its record, the digest of its text, its length in tokens."""

    rows: NDArray[np.int64]
    digests: NDArray[np.uint64]
    num_tokens: NDArray[np.int32]


class RenderedPrompts(PromptDataset):
    """Prompts that are made of their records whenever they are taken, which gives the same ones each time."""

    def __init__(
        self,
        renderer: Renderer,
        records: Records,
        columns: Columns,
        counts: Counts,
        notes: Sequence[str],
        fingerprint: int | None,
    ) -> None:
        super().__init__((), counts, notes)
        self._renderer = renderer
        self._records = records
        self._columns = columns
        self._fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._columns.rows)

    def take(self, indices: Sequence[int]) -> list[Prompt]:
        made = []
        for i in indices:
            row = int(self._columns.rows[i])
            record, where = self._records[row], self._records.where(row)
            text = self._renderer.text(record, where)
            if digest_of(text) != self._columns.digests[i]:
                raise ReheatError(f"{where} was changed while the run reads it; start the run again")
            made.append((i, text, self._renderer.verifier(record, where), self._renderer.solution(record, where)))
        token_ids = self._renderer.encode([text for _, text, _, _ in made])
        return [
            Prompt(index=i, text=text, token_ids=tuple(ids), verifier=verifier, solution=solution)
            for (i, text, verifier, solution), ids in zip(made, token_ids, strict=True)
        ]

    def hinted(self, index: int, solution: str | None = None) -> tuple[int, ...] | None:
        """Token ids of the prompt `index` as `hint_template` shows it, with `solution` in the place of the record's own; None
        if there are more than `max_hinted_prompt_tokens`."""
        row, renderer = int(self._columns.rows[index]), self._renderer
        text = renderer.hinted_text(self._records[row], self._records.where(row), solution)
        (ids,) = renderer.encode([text])
        return tuple(ids) if len(ids) <= renderer.config.max_hinted_prompt_tokens else None

    @property
    def fingerprint(self) -> int:  # type: ignore[override]
        return super().fingerprint if self._fingerprint is None else self._fingerprint

    @property
    def digests(self) -> NDArray[np.uint64]:  # type: ignore[override]
        return self._columns.digests

    @property
    def longest(self) -> int:
        return int(self._columns.num_tokens.max())

    def verifiers(self) -> Iterator[Mapping[str, Any]]:
        for row in map(int, self._columns.rows):
            yield self._renderer.verifier(self._records[row], self._records.where(row))

    def values(self, key: str, place: str) -> Iterator[Any]:
        """The field `key` of the record that each prompt is made of.

        Raises:
            ConfigError: a record lacks it; `place` is what names it in the recipe.
        """
        for row in map(int, self._columns.rows):
            yield required(self._records[row], key, place, self._records.where(row))

    def describe(self) -> list[str]:
        counts, section = self.counts, self._renderer.section
        text = f"{section}: {len(self):,} prompts of {counts.records:,} records"
        if counts.duplicates and self._renderer.config.deduplicate:
            text += f"; {counts.duplicates:,} duplicates left out"
        elif counts.duplicates:
            text += f"; {counts.duplicates:,} are duplicates ({section}.deduplicate=true leaves them out)"
        if counts.other_answers:
            text += f", {counts.other_answers:,} with another answer"
        if counts.skipped:
            text += f"; {counts.skipped:,} longer than {section}.max_prompt_tokens skipped"
        if counts.overlapping:
            text += f"; {counts.overlapping:,} that are in the training data left out"
        return [text, *self.notes]

    def _select(self, indices: NDArray[np.int64], counts: Counts) -> PromptDataset:
        c = self._columns
        columns = Columns(c.rows[indices], c.digests[indices], c.num_tokens[indices])
        return RenderedPrompts(self._renderer, self._records, columns, counts, self.notes, fingerprint=None)


def digest_of(text: str) -> int:
    """xxh3-64 of the text's UTF-8; a lone surrogate is encoded as if it were a character."""
    return xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass"))


def extend_fingerprint(crc: int, text: str) -> int:
    """The CRC-32 after one more text; begins with 0."""
    return zlib.crc32(text.encode(errors="surrogatepass") + b"\0", crc)
