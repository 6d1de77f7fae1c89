"""Records (plain dictionaries) by number, read from disk when they are asked for.

A data set may hold millions of records and a node several ranks, so what stays in memory is where each record lies:
8 bytes for a line of JSON, nothing for a row of an Arrow file.
"""

from __future__ import annotations

import array
import bisect
import itertools
import json
import os
import pickle
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_reheat.errors import ConfigError, ReheatError

Record = dict[str, Any]

UTF8 = "utf-8-sig"  # a byte order mark at the beginning says nothing and is left out
BLANK = b"\xef\xbb\xbf \t\r\n"
# pickled records that are kept in memory before they go to an unnamed file
SPOOL_BYTES = 64 * 2**20
ROWS_AT_A_TIME = 1000


class Records(ABC):
    """Iterating checks every record; `records[i]` reads one again, without those checks. `place` is where they are from."""

    def __init__(self, place: str = "") -> None:
        self._place = place

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Record:
        """
        Raises:
            ReheatError: the file is no longer what was iterated over.
        """

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def where(self, index: int) -> str:
        """How an error names the record."""
        return f"record {index} of {self._place}" if self._place else f"record {index}"


class Listed(Records):
    """Records that are in memory anyway."""

    def __init__(self, records: Sequence[Record], place: str = "") -> None:
        super().__init__(place)
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self._records[index]


class JsonLines(Records):
    """The lines of a file, by their offsets; blank ones are no records. `hint` ends the error for a line that is not JSON."""

    def __init__(self, path: Path, hint: str = "") -> None:
        super().__init__(str(path))
        self._hint = hint
        self._file = path.open("rb")  # stays open: a file that is put in its place later is another one
        self._starts = array.array("q")
        self._blanks = array.array("q")  # of each blank line, the number of records before it
        position = 0
        for line in self._file:
            if line.strip(BLANK):
                self._starts.append(position)
            else:
                self._blanks.append(len(self._starts))
            position += len(line)
        self._starts.append(position)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __iter__(self) -> Iterator[Record]:
        for i in range(len(self)):
            try:
                yield parse_object(self._bytes(i))
            except ValueError as error:
                raise ConfigError(f"{self._place}:{self._line(i)} {error}{self._hint}; correct the line") from None

    def __getitem__(self, index: int) -> Record:
        try:
            return json.loads(self._bytes(index).decode(UTF8))
        except ValueError:
            raise ReheatError(f"{self.where(index)} was changed while the run reads it; start it again") from None

    def where(self, index: int) -> str:
        return f"record {index} of {self._place} (line {self._line(index)})"

    def _bytes(self, index: int) -> bytes:
        start, end = self._starts[index], self._starts[index + 1]
        # not a memory map: reading past the end of a file that was cut would kill the process
        return os.pread(self._file.fileno(), end - start, start)

    def _line(self, index: int) -> int:
        """Counts from 1, blank lines included."""
        return index + 1 + bisect.bisect_right(self._blanks, index)


class Spooled(Records):
    """Records that are made or decompressed in one go, kept as pickles: in memory, or from SPOOL_BYTES in an unnamed file.

    Not thread-safe.
    """

    def __init__(self, records: Iterable[Record], place: str = "") -> None:
        super().__init__(place)
        self._file = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115 - open as long as the records are used
        self._starts = array.array("q", [0])
        for record in records:
            self._append(pickle.dumps(record, pickle.HIGHEST_PROTOCOL))

    def _append(self, pickled: bytes) -> None:
        try:
            self._file.write(pickled)
        except OSError as error:
            raise ConfigError(
                f"{self._place or 'the records'} do not fit into {tempfile.gettempdir()} ({error.strerror}); set TMPDIR"
            ) from None
        self._starts.append(self._file.tell())

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Record:
        self._file.seek(self._starts[index])
        return pickle.loads(self._file.read(self._starts[index + 1] - self._starts[index]))


class ArrowRows(Records):
    """The rows of a `datasets.Dataset`, which is mapped into memory and so shared by the ranks of a node."""

    def __init__(self, dataset: Any, place: str) -> None:
        super().__init__(place)
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self), ROWS_AT_A_TIME):
            try:
                columns = self._dataset[start : start + ROWS_AT_A_TIME]
            except ValueError:  # text that is not UTF-8: find out where
                yield from (self[i] for i in range(start, min(start + ROWS_AT_A_TIME, len(self))))
                continue
            for row in zip(*columns.values(), strict=True):
                yield dict(zip(columns, row, strict=True))

    def __getitem__(self, index: int) -> Record:
        try:
            return self._dataset[index]
        except ValueError as error:
            raise ConfigError(f"{self.where(index)} cannot be read: {error}") from None


class Joined(Records):
    """Several files, one after the other."""

    def __init__(self, parts: Sequence[Records]) -> None:
        super().__init__()
        self._parts = parts
        self._ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __iter__(self) -> Iterator[Record]:
        return itertools.chain.from_iterable(self._parts)

    def __getitem__(self, index: int) -> Record:
        part, index = self._find(index)
        return part[index]

    def where(self, index: int) -> str:
        part, index = self._find(index)
        return part.where(index)

    def _find(self, index: int) -> tuple[Records, int]:
        number = bisect.bisect_right(self._ends, index)
        return self._parts[number], index - (self._ends[number] - len(self._parts[number]))


def parse_object(text: bytes) -> Record:
    """A record from its JSON.

    Raises:
        ValueError: what is wrong with it, as the rest of a sentence.
    """
    try:
        record = parse_json(text)
    except ValueError as error:
        raise ValueError(f"is not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"must hold a JSON object, not a {type(record).__name__}")
    return record


def parse_json(text: bytes) -> Any:
    """
    Raises:
        ValueError: it is not UTF-8 or not JSON, or an object has a key twice, of which Python would keep the last.
    """
    try:
        return json.loads(text.decode(UTF8), object_pairs_hook=_without_repeats)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> Record:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands in one object twice")
    return found
