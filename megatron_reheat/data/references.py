"""What a grader is given of a record: the reference answer as text, or the reasoning-gym entry as its task made it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from megatron_reheat.errors import ConfigError


def reference_text(value: Any, place: str) -> str:
    """A record's answer as the text that responses are compared with; numbers keep their exact decimal form.

    A list of one answer is that answer. `place` names the field and the record.

    Raises:
        ConfigError: there is no answer, or none that a response could give.
    """
    if isinstance(value, list | tuple) and len(value) == 1:
        (value,) = value
    if isinstance(value, str):
        if not value.strip() or value.strip().lower() == "nan":
            raise _refusal(place, f"holds {value!r}")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise _refusal(place, "is null" if value is None else f"holds {_described(value)}")
    if not math.isfinite(value):
        raise _refusal(place, f"is {value}")
    return str(value) if isinstance(value, int) else f"{Decimal(str(value)):f}"


def gym_entry(record: Mapping[str, Any], place: str) -> tuple[str | None, dict[str, Any]]:
    """The task that made a reasoning-gym entry, None if it names none, and the entry; its metadata may be JSON text.

    Arrow holds no mapping whose keys or values differ in type, so that a copy for `datasets` may keep them as text.

    Raises:
        ConfigError: the text is no JSON object.
    """
    entry = dict(record)
    if isinstance(metadata := record.get("metadata"), str):
        try:
            entry["metadata"] = json.loads(metadata)
        except ValueError:
            entry["metadata"] = None
        if not isinstance(entry["metadata"], dict):
            raise ConfigError(f"metadata of {place} is text but no JSON object; write it with json.dumps")
    metadata = entry.get("metadata")
    return (metadata.get("source_dataset") if isinstance(metadata, dict) else None), entry


def _described(value: Any) -> str:
    if isinstance(value, bool):
        return f"a truth value ({str(value).lower()})"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    return f"a {type(value).__name__}"


def _refusal(place: str, what: str) -> ConfigError:
    return ConfigError(f"{place} {what}; a reference answer is a text or a finite number")
