"""The fields of a record by name, dotted where they are nested, and texts filled with them."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping, Sequence
from functools import lru_cache
from numbers import Number
from typing import Any

from megatron_reheat.data.records import Record
from megatron_reheat.errors import ConfigError

MAX_WIDTH = 1000  # of a field that a template pads


def lookup(record: Mapping[str, Any], key: str) -> Any:
    """The column `key`, or else what its dots lead to: `a.b` is record["a"]["b"], `a.0` the first of a list.

    Raises:
        KeyError: there is no such field.
    """
    if key in record:
        return record[key]
    value: Any = record
    for part in key.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list | tuple) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise KeyError(key)
    return value


def names(record: Mapping[str, Any]) -> str:
    """Every field that can be named, for errors: those of a mapping by their dotted keys."""
    found: list[str] = []
    for key, value in record.items():
        found += [f"{key}.{inner}" for inner in value] if isinstance(value, Mapping) and value else [key]
    return ", ".join(sorted(found))


def required(record: Record, key: str, place: str, where: str) -> Any:
    """The field `key`, which the recipe names under `place` (e.g. data.prompt_key).

    Raises:
        ConfigError: it is missing, null or empty.
    """
    try:
        value = lookup(record, key)
    except KeyError:
        raise ConfigError(f"{place} {key!r} is missing in {where}; available: {names(record)}") from None
    state = "null" if value is None else "empty" if _is_empty(value) else None
    if state:
        raise ConfigError(f"{place} {key!r} is {state} in {where}; available: {names(record)}")
    return value


def fill(template: str, record: Record, place: str, where: str) -> str:
    """`template` with the record's fields in its braces; a list becomes its items with commas between them.

    Fields of a reasoning-gym entry's metadata are named like its own.

    Raises:
        ConfigError: a field is missing, or is no text, number or list of these.
    """
    metadata = record.get("metadata")
    fields = {**metadata, **record} if isinstance(metadata, Mapping) else record
    try:
        return _Filler().vformat(template, (), fields)
    except _NoText as error:
        raise ConfigError(f"{place} names {error} in {where}; name text or numbers") from None
    except KeyError as error:
        available = names({key: value for key, value in fields.items() if key != "metadata"})
        raise ConfigError(f"{place} names {error}, which {where} lacks; available: {available}") from None
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{place} {template!r} cannot be filled from {where}: {error}; write a literal brace as '{{{{' or '}}}}'"
        ) from None


class _NoText(Exception):
    """A field that would stand in the text as Python writes it."""


class _Filler(string.Formatter):
    def parse(self, template: str) -> list[Any]:  # type: ignore[override]  # an iterable would do, and a list can be kept
        return _parsed(template)

    def format_field(self, value: Any, spec: str) -> str:
        if spec and any(int(number) > MAX_WIDTH for number in re.findall(r"\d{1,9}", spec)):
            raise ValueError(f"a width above {MAX_WIDTH}")
        return super().format_field(value, spec)

    def get_field(self, name: str, args: Sequence[Any], fields: Mapping[str, Any]) -> tuple[Any, str]:
        if name.isdecimal() and name not in fields:
            raise IndexError("a brace without a field's name")
        try:
            value = lookup(fields, name)
        except KeyError:
            if not any(sign in name for sign in "[]"):
                raise
            value, _ = super().get_field(name, args, fields)
        return _as_text(name, value), name


@lru_cache(maxsize=64)
def _parsed(template: str) -> list[Any]:
    """Of a template, or of what a field of it says of its width."""
    return list(string.Formatter().parse(template))


def _as_text(name: str, value: Any) -> Any:
    items = value if isinstance(value, list | tuple) else [value]
    for item in items:
        if item is None or (isinstance(item, float) and not math.isfinite(item)):
            raise _NoText(f"{name!r}, which is {'null' if item is None else item}")
        if isinstance(item, bool) or not isinstance(item, str | Number):
            raise _NoText(f"{name!r}, which holds a {type(item).__name__}")
    return ",".join(map(str, items)) if isinstance(value, list | tuple) else value


def _is_empty(value: Any) -> bool:
    return not value.strip() if isinstance(value, str) else isinstance(value, list | tuple | dict) and not value
