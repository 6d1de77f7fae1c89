"""Responses that others wrote to the run's prompts, in files, joined to the prompts by a field of their records."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_reheat.data.dataset import digest_of
from megatron_reheat.data.fields import required
from megatron_reheat.data.files import read_file
from megatron_reheat.data.mixture import RunPrompts
from megatron_reheat.data.records import Joined, Records
from megatron_reheat.errors import ConfigError


class Trajectories:
    """Texts by prompt. In memory is where they lie; a prompt's own are read when they are asked for."""

    def __init__(
        self, paths: Sequence[str], prompts: RunPrompts, *, key: str, prompt_key: str, texts_key: str, section: str
    ) -> None:
        """
        Args:
            key: the field of a trajectory record that names its prompt. Several records may name the same one.
            prompt_key: the field of a prompt's record that it has to equal.
            texts_key: the field that holds a text, or a list of them.
            section: of the recipe, for errors; `path`, `key`, `prompt_key` and `texts_key` are its keys.

        Raises:
            ConfigError: naming the file, record and key at fault; also when nothing is joined.
        """
        parts = [read_file(Path(path), section=section, options={}) for path in paths]
        self._records: Records = parts[0] if len(parts) == 1 else Joined(parts)
        self._texts_key, self._section = texts_key, section
        numbers: dict[int, list[int]] = defaultdict(list)  # of prompts, by the digest of what names them
        for number, value in enumerate(prompts.values(prompt_key, f"{section}.prompt_key")):
            numbers[_digest(value)].append(number)
        self._places: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self.num_unknown = 0  # texts whose prompt is not among the run's
        for row, record in enumerate(self._records):
            named = numbers.get(_digest(required(record, key, f"{section}.key", self._records.where(row))), [])
            count = len(self._texts(row, record))
            self.num_unknown += 0 if named else count
            for number in named:
                self._places[number] += [(row, i) for i in range(count)]
        if not self._places:
            raise ConfigError(
                f"{section}: no {key!r} in {', '.join(paths)} equals the {prompt_key!r} of a prompt; correct {section}.key or "
                f"{section}.prompt_key"
            )

    def __len__(self) -> int:
        return sum(map(len, self._places.values()))

    @property
    def num_prompts(self) -> int:
        """Those that have any."""
        return len(self._places)

    def of(self, number: int) -> list[str]:
        """The texts for the prompt of that index, in the order of the files."""
        return [self._text(*place) for place in self._places.get(number, ())]

    def sample(self, limit: int) -> list[str]:
        """At most `limit` of all texts, evenly spaced."""
        places = [place for of_prompt in self._places.values() for place in of_prompt]
        chosen = np.linspace(0, len(places) - 1, min(limit, len(places))).round().astype(int)
        return [self._text(*places[i]) for i in chosen]

    def _text(self, row: int, i: int) -> str:
        return self._texts(row, self._records[row])[i]

    def _texts(self, row: int, record: dict[str, Any]) -> list[str]:
        where, place = self._records.where(row), f"{self._section}.texts_key"
        value = required(record, self._texts_key, place, where)
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise ConfigError(f"{place} {self._texts_key!r} must hold a text or a list of texts in {where}, none empty")
        return texts


def _digest(value: Any) -> int:
    """Of a name, which may be a number in one file and a text in another, or a list of messages."""
    return digest_of(value if isinstance(value, str) else json.dumps(value, sort_keys=True))
