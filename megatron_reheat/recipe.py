"""YAML -> validated, frozen configuration.

A recipe names a `base:` and holds only what differs; `key=value` arguments come last. Mappings are joined key by key; `null`
empties one that is passed on (`data.options`, `data.chat_template_kwargs`). Unknown keys are refused with a
suggestion.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ValidationError,
)

from megatron_reheat import recipe_text
from megatron_reheat.confidential import redact
from megatron_reheat.config import Config
from megatron_reheat.config_fields import shown
from megatron_reheat.errors import ConfigError
from megatron_reheat.files import NO_SUCH_FILE, problem_of_file
from megatron_reheat.foreign_keys import translations
from megatron_reheat.recipe_text import MAX_DEPTH
from megatron_reheat.shipped_recipes import find_recipe, similar

MAX_LISTED = 4  # errors that are told at once
MAX_RECIPE_BYTES = 2**20


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe, a file or one that comes with the package, applies `key=value` overrides and validates.

    Raises:
        ConfigError: naming the file and key, with the fix.
    """
    origins: dict[str, str] = {}
    tree = _read_tree(find_recipe(Path(path)), (), origins)
    for override in overrides:
        origins |= dict.fromkeys(apply_override(tree, override), "on the command line")
    return parse_config(tree, origins)


def parse_config(tree: dict[str, Any], origins: Mapping[str, str] | None = None) -> Config:
    """`origins` tells where a key's value was given, by dotted key, for errors."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = error.errors()
        more = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise ConfigError("; ".join(explain(e, origins or {}) for e in problems[:MAX_LISTED]) + more) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, loadable by `load_config`; secrets are left out."""
    return recipe_text.dump(public_tree(config))


def public_tree(config: Config) -> dict[str, Any]:
    """What may be written down and sent to trackers: plain values, without secrets."""
    tree: dict[str, Any] = redact(config.model_dump(mode="json"))
    return tree


def _read_tree(path: Path, seen: tuple[Path, ...], origins: dict[str, str]) -> dict[str, Any]:
    """`origins` is told where each key of the result was given."""
    referrer = f", named as base by {seen[-1]}" if seen else ""
    path = Path(os.path.abspath(path)) if "\0" in str(path) else Path(os.path.realpath(path))
    if path in seen:
        names = " -> ".join(p.name for p in (*seen, path))
        raise ConfigError(f"{path}: remove one of the bases, because these base files form a loop: {names}")
    if problem := problem_of_file(path, MAX_RECIPE_BYTES):
        if problem.startswith(NO_SUCH_FILE):
            known = f"; did you mean the recipe {' or '.join(near)}?" if (near := similar(path)) and not seen else ""
            raise ConfigError(f"no such config file: {path}{referrer}{known}")
        raise ConfigError(f"{path} cannot be read{referrer}: {problem}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path} cannot be read{referrer}: line {line} is not UTF-8; save it as text in UTF-8"
        ) from None
    try:
        given, lines = recipe_text.read_recipe(text, Config)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(given := {} if given is None else given, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, not a {type(given).__name__}")
    tree: dict[str, Any] = given
    base = tree.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"{path}: base must be the path of one recipe, not {shown(base)}")
    if base == "":
        raise ConfigError(f"{path}: base is empty; name a recipe, or leave it out")
    if base is not None:
        tree = merged(_read_tree(path.parent / base, (*seen, path), origins), tree)
    origins |= {key: f"{path.name}, line {line}" for key, line in lines.items()}
    return tree


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, mappings key by key."""
    tree = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(tree.get(key), Mapping)
        tree[key] = merged(tree[key], value) if both else value
    return tree


def apply_override(tree: dict[str, Any], override: str) -> list[str]:
    """Sets one `section.key=value` in `tree`, the value read as the key's type asks for; returns the keys that it gives.

    A section's mapping changes those keys alone, as a recipe does with its base's; any other mapping replaces what was there.

    Raises:
        ConfigError: it is not of that form.
    """
    key, separator, text = override.partition("=")
    key = key.strip()
    if not separator or not key:
        raise ConfigError(f"override {shown(override)} is not of the form key=value (e.g. rl.group_size=16)")
    if key.count(".") > MAX_DEPTH:
        raise ConfigError(f"override {shown(key)}: no key lies so deep; write section.key=value")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"override {key}: {parent} is a value, not a section")
    annotation = recipe_text.type_of(Config, [*parents, leaf])
    try:
        value = recipe_text.read_value(text, annotation)
    except recipe_text.Refused as error:
        raise ConfigError(f"override {key}: {error}") from None
    except ValueError:
        raise ConfigError(f"override {key}: {shown(text)} is not a valid YAML value; quote it") from None
    merges = any(_section_types(annotation)) and isinstance(value, dict) and isinstance(node.get(leaf), dict)
    node[leaf] = merged(node[leaf], value) if merges else value
    return list(_keys_of(value, key))


def _keys_of(value: Any, key: str) -> Iterator[str]:
    yield key
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _keys_of(inner, f"{key}.{name}")


def explain(
    error: Any, origins: Mapping[str, str] | None = None, *, section: type[BaseModel] | None = None, prefix: str = ""
) -> str:
    """One of pydantic's errors as a sentence: the key, what is wrong, what was given, and for a typo what was meant.

    `section` is what was validated, by default a whole recipe, and `prefix` its place in one, a dot at the end.
    """
    location = [str(part) for part in error["loc"]]
    key, origins = prefix + ".".join(location), origins or {}
    where = f" ({origin})" if (origin := _origin(location, origins)) else ""
    if error["type"] == "extra_forbidden":
        foreign = translations(key, error["input"])[:MAX_LISTED]
        meant = f"; {', '.join(foreign)} here" if foreign else _suggestion(location, section or Config)
        return f"{key}: unknown key{meant}{where if ', line ' in where else ''}"
    if error["type"] == "missing":
        return f"{key}: this key is required"
    if error["type"] == "model_type":
        return f"{key or 'the recipe'}: must hold keys and values, not {shown(error['input'])}{where}"
    message, given = error["msg"].removeprefix("Value error, "), error["input"]
    if not key or (error["type"] == "value_error" and isinstance(given, dict)):  # of fields together: it names them
        return f"{key}: {message}" if key else message
    if error["type"] in _HIDDEN:
        return f"{key}: {message}{where}"
    if error["type"] == "int_parsing_size":
        message = "must be a number of less than 20 digits"
    text = shown(given)
    return f"{key}: {message}{'' if text in message else f', got {text}'}{where}"


_HIDDEN = ("secret_in_url",)


def _origin(location: Sequence[str], origins: Mapping[str, str]) -> str | None:
    """Where the key, or the section or list that it stands in, was given."""
    given = (".".join(location[:end]) for end in range(len(location), 0, -1))
    return next((origins[key] for key in given if key in origins), None)


def _suggestion(location: list[str], section: type[BaseModel]) -> str:
    section = next(_section_types(recipe_text.type_of(section, location[:-1])), section)
    if section is Config and (homes := [name for name, part in _sections() if location[-1] in part.model_fields]):
        return f"; did you mean {' or '.join(f'{home}.{location[-1]}' for home in homes)}?"
    close = difflib.get_close_matches(location[-1], section.model_fields, n=1)
    known = f"known keys: {', '.join(section.model_fields)}" if section.model_fields else "there are none"
    return f"; did you mean '{close[0]}'?" if close else f"; {known}"


def _sections() -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in Config.model_fields.items():
        for section in _section_types(field.annotation):
            yield name, section


def _section_types(annotation: Any) -> Iterator[type[BaseModel]]:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            yield candidate
