"""Files of records: JSON lines, JSON arrays, CSV (each also gzipped) and Parquet, told apart by their names."""

from __future__ import annotations

import csv
import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_reheat.config_fields import shown
from megatron_reheat.data.arrow import read_parquet
from megatron_reheat.data.records import BLANK, UTF8, JsonLines, Record, Records, Spooled, parse_json, parse_object
from megatron_reheat.errors import ConfigError
from megatron_reheat.files import problem_of_file

TEXT_KINDS = (".jsonl", ".json", ".csv")
KINDS = (*TEXT_KINDS, *(f"{kind}.gz" for kind in TEXT_KINDS), ".parquet")

JSON_HINT = "; a .json file holds an array of records, or one record a line"

Opener = Callable[..., Any]


def read_file(path: Path, *, section: str, options: Mapping[str, Any], kind: str | None = None) -> Records:
    """The records of one file; `kind` (of KINDS) where its name tells none. `options` are load_dataset's, for Parquet.

    Text keeps what it spells: a field of CSV is text, and a number in JSON is whole or not as it is written.

    Raises:
        ConfigError: naming the file. Lines of JSON are checked when the records are iterated over.
    """
    if problem := problem_of_file(path):
        raise ConfigError(f"{section}.path: cannot read {path}: {problem}")
    with path.open("rb") as file:
        start = file.read(1024)
    kind = next((known for known in KINDS if path.name.lower().endswith(known)), kind)
    if kind is None:
        raise ConfigError(f"{section}.path: {path} is none of {', '.join(KINDS)}; rename or convert it")
    if not start:
        raise ConfigError(f"{section}.path: {path} is an empty file; name one with records")
    if kind == ".parquet":
        return read_parquet(path, section, options)
    if options:
        raise ConfigError(
            f"{section}.options {shown(dict(options))} mean nothing for {path}; set {section}.options=null"
        )
    if kind == ".jsonl" or (kind == ".json" and not start.lstrip(BLANK).startswith(b"[")):
        records: Records = JsonLines(path, JSON_HINT if kind == ".json" else "")
    else:
        records = Spooled(_read_text(path, kind), str(path))
    if not len(records):
        raise ConfigError(f"{section}.path: {path} holds no records")
    return records


def _read_text(path: Path, kind: str) -> Iterator[Record]:
    opener: Opener = gzip.open if kind.endswith(".gz") else open
    try:
        yield from _READERS[kind.removesuffix(".gz")](path, opener)
    except UnicodeDecodeError:
        raise ConfigError(_first_line_that_is_not_utf8(path, opener)) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} cannot be read as gzip ({error}); copy it again") from None


def _json(path: Path, opener: Opener) -> Iterator[Record]:
    with opener(path, "rb") as file:
        content = file.read()
    if not content.lstrip(BLANK).startswith(b"["):
        yield from _lines(path, io.BytesIO(content), JSON_HINT)
        return
    try:
        records = parse_json(content)
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}; correct the file") from None
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise ConfigError(f"record {i} of {path} must be a JSON object, not a {type(record).__name__}")
        yield record


def _json_lines(path: Path, opener: Opener) -> Iterator[Record]:
    with opener(path, "rb") as file:
        yield from _lines(path, file)


def _lines(path: Path, lines: Iterable[bytes], hint: str = "") -> Iterator[Record]:
    for number, line in enumerate(lines, start=1):
        if line.strip(BLANK):
            try:
                yield parse_object(line)
            except ValueError as error:
                raise ConfigError(f"{path}:{number} {error}{hint}; correct the line") from None


def _csv(path: Path, opener: Opener) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is shorter than a long document
    with opener(path, "rt", newline="", encoding=UTF8) as lines:
        rows = csv.reader(lines, strict=True)
        try:
            names = next(rows, [])
            if twice := [name for name in names if names.count(name) > 1]:
                raise ConfigError(f"{path} has two columns {twice[0]!r}; rename one of them")
            for row in rows:
                if len(row) not in (0, len(names)):
                    raise ConfigError(f"{path}:{rows.line_num} has {len(row)} fields, its header {len(names)}")
                if row:
                    yield dict(zip(names, row, strict=True))
        except csv.Error as error:
            raise ConfigError(f"{path}:{rows.line_num} cannot be read as CSV: {error}; correct the file") from None


_READERS: dict[str, Callable[[Path, Opener], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
}


def _first_line_that_is_not_utf8(path: Path, opener: Opener) -> str:
    with opener(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"{path}:{number} is not UTF-8 ({error}); convert the file"
    return f"{path} is not UTF-8; convert it"
