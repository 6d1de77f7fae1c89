"""Every key of a recipe with its type, default and meaning: for people (Markdown) and for editors (a JSON Schema).

Both are made of the models in `config` and of the methods' own, and lie beside the recipes (`yaml/README.md`,
`yaml/recipe.schema.json`); `python -m megatron_reheat.config_reference FOLDER` writes them there anew.
"""

from __future__ import annotations

import json
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_reheat.config import Config
from megatron_reheat.config_fields import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    Section,
    check_path,
    check_temperature,
    checked_url,
)
from megatron_reheat.errors import ConfigError
from megatron_reheat.foreign_keys import PROJECTS
from megatron_reheat.methods import METHODS, method_class

MARKDOWN, SCHEMA = "README.md", "recipe.schema.json"
LARGEST_SHOWN = 1000  # a higher upper bound only keeps out slips of the keyboard
INTRODUCTION = """# Keys of a recipe

A recipe names a `base:` and holds what differs from it; `key=value` on the command line comes last. Defaults are those of the
code; what a recipe resolves to is in the `config.yaml` of its run. `reheat config SECTION` prints these tables. Editors that
know YAML schemas read `recipe.schema.json`, which the recipes here name in their first line.

Made of the code by `python -m megatron_reheat.config_reference yaml`; do not edit.
"""


class Row(NamedTuple):
    """One key, by its dotted name; `kind` says what values it takes, `default` is `required` where there is none."""

    key: str
    kind: str
    default: str
    meaning: str


def sections() -> dict[str, type[Section]]:
    """By their names in a recipe."""
    return {name: field.annotation for name, field in Config.model_fields.items() if field.annotation}  # type: ignore[misc]


def rows(section: type[BaseModel], prefix: str) -> Iterator[Row]:
    """One for each field; where that holds sections by name, also the keys, as `NAME.key`, that their base lacks."""
    for name, field in section.model_fields.items():
        default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
        yield Row(f"{prefix}{name}", kind_of(field), default, field.description or "")
        if (part := _named_section(field.annotation)) is not None:
            shared = {key for base in part.__bases__ for key in getattr(base, "model_fields", ())}
            yield from (row for row in rows(part, f"{prefix}{name}.NAME.") if row.key.rpartition(".")[2] not in shared)


def tables(section: str) -> Iterator[tuple[str, list[Row]]]:
    """Of a section, and below `rl` of each method that has keys of its own, with what they are called.

    Raises:
        ConfigError: there is no such section.
    """
    known = sections()
    if section not in known:
        raise ConfigError(f"no section {section!r}; there are {', '.join(known)}")
    yield section, list(rows(known[section], f"{section}."))
    for method in METHODS if section == "rl" else ():
        if found := list(rows(method_class(method).Options, "rl.options.")):
            yield f"rl.options of {method}", found


def kind_of(field: FieldInfo) -> str:
    """What values it takes, in words."""
    return _kind(field.annotation, field.metadata)


def _kind(annotation: Any, metadata: list[Any]) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(inner[0], [*metadata, *inner[1:]])
    if origin in (typing.Union, types.UnionType):
        parts = [_kind(part, metadata) for part in inner if part is not type(None)]
        return " or ".join([*parts, "empty"] if type(None) in inner else parts)
    if origin is Literal:
        return ", ".join(map(str, inner))
    validators = [getattr(item, "func", None) for item in metadata]
    if origin in (tuple, list):
        return f"list of {_kind(inner[0], [])}s"
    if origin in (dict, Mapping):
        return "mapping" if _named_section(annotation) is None else "sections by name"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section"
    if check_temperature in validators:
        return f"number, {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"
    if checked_url in validators:
        return "URL"
    if check_path in validators:
        return "path"
    names = {bool: "true, false", int: "integer", float: "number", str: "text"}
    return ", ".join([names.get(annotation, getattr(annotation, "__name__", str(annotation))), *_bounds(metadata)])


def _named_section(annotation: Any) -> type[BaseModel] | None:
    """The section that stands under each name, where that is what a key holds."""
    inner = typing.get_args(annotation)[1:] if typing.get_origin(annotation) is dict else ()
    return next((kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _bounds(metadata: list[Any]) -> Iterator[str]:
    for sign, name in ((">", "gt"), (">=", "ge"), ("<", "lt"), ("<=", "le")):
        for item in metadata:
            bound = getattr(item, name, None)
            if bound is not None and abs(bound) <= LARGEST_SHOWN:
                yield f"{sign} {bound:g}"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if value is None or value in ({}, ()):
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def print_reference(section: str | None) -> None:
    """As tables that fit the terminal.

    Raises:
        ConfigError: there is no such section.
    """
    console = Console()
    for name in sections() if section is None else [section]:
        for title, found in tables(name):
            table = Table(title=f"\n{title}", title_justify="left", box=None, pad_edge=False)
            table.add_column("key", no_wrap=True)
            table.add_column("values [default]", overflow="fold", max_width=28)
            table.add_column("meaning", overflow="fold")
            for row in found:
                table.add_row(row.key.rpartition(".")[2], escape(f"{row.kind} [{row.default}]"), escape(row.meaning))
            console.print(table)


def markdown() -> str:
    """The text of `yaml/README.md`."""
    parts = [INTRODUCTION]
    for name, section in sections().items():
        parts += [f"## {name}\n", *_paragraph(section), _table(rows(section, f"{name}."))]
    parts.append("## rl.options\n\nEach method's own keys; what they mean in full stands in its file.\n")
    for method in METHODS:
        cls = method_class(method)
        found = list(rows(cls.Options, "rl.options."))
        file = f"../megatron_reheat/methods/{METHODS[method].partition(':')[0]}.py"
        parts.append(f"### [{method}]({file})\n\n{_table(found) if found else 'None.' + chr(10)}")
    parts.append("## Keys of other trainers\n\nWhat an unknown key's error says, too.\n")
    for project, keys in PROJECTS.items():
        lines = [f"| {project} | here |", "|---|---|", *(f"| `{theirs}` | {ours} |" for theirs, ours in keys.items())]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _paragraph(section: type[BaseModel]) -> list[str]:
    text = section.__dict__.get("__doc__") or ""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    return [f"{part}\n" for part in paragraphs if part]


def _table(found: typing.Iterable[Row]) -> str:
    lines = ["| key | values | default | |", "|---|---|---|---|"]
    for row in found:
        cells = [
            f"`{row.key}`",
            row.kind,
            f"`{row.default}`" if row.default not in ("empty", "required") else row.default,
        ]
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in (*cells, row.meaning)) + " |")
    return "\n".join(lines) + "\n"


def schema() -> dict[str, Any]:
    """A JSON Schema of one file of a recipe: nothing is required, because a base may hold it."""
    made = Config.model_json_schema()
    for part in (made, *made["$defs"].values()):
        part.pop("required", None)
    made["properties"] = {
        "base": {"type": "string", "description": "the recipe that this one differs from, by its path from here"},
        **made["properties"],
    }
    made["title"] = "a recipe of megatron_reheat"
    return made


def write(folder: Path) -> None:
    """Into an existing folder, over what it holds under these names."""
    for name, text in files().items():
        (folder / name).write_text(text, encoding="utf-8")


def files() -> dict[str, str]:
    """What belongs into the folder of the recipes, by name."""
    return {MARKDOWN: markdown(), SCHEMA: json.dumps(schema(), indent=1) + "\n"}


if __name__ == "__main__":
    write(Path(sys.argv[1]))
