"""What is typed into a recipe, or behind `key=`, read as the field's type asks for and not as YAML would guess.

YAML takes `42` for a number, `2024-02-30` for a date, `none` and `1e-6` for text, whatever the field is. Here a scalar stays
the text that was typed, and pydantic makes a number or a switch of it. Decided here is what text alone cannot say: that there
is no value, that an integer is written `1e3`, and where lists and mappings begin. Only what a recipe passes on to others
(`dict[str, Any]`) is left to YAML's own rules.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel

NULLS = ("", "~", "null", "none")
QUOTES = "'\""
_STRING, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_VALUE, _FLOAT = "tag:yaml.org,2002:value", "tag:yaml.org,2002:float"
_TIMESTAMP, _INT = "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:int"

MAX_DEPTH = 100
_NEST = re.compile(rf"(?:[\[{{]\s*){{{MAX_DEPTH + 1}}}")
MAX_VALUES = 100_000  # of a recipe, with what its aliases stand for
MAX_BITS = 64  # of a number that is passed on

Lines = dict[str, int]


class Refused(ValueError):
    """YAML that says something else than its author can have meant; a sentence with the line and the fix."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without dates, and with `1e-6` for the number it is."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    number: int = yaml.SafeLoader.construct_yaml_int(loader, node)
    if number.bit_length() > MAX_BITS:
        raise ValueError("too large")
    return number


_Loader.add_constructor(_INT, _construct_int)
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789"))


class _Dumper(yaml.SafeDumper):
    """Quotes text that would be read as no value."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar(_STRING, text, style="'" if is_null(text) else None)


_Dumper.add_representer(str, _represent_text)


def dump(tree: dict[str, Any]) -> str:
    """YAML that `read_recipe` reads back to the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def read_recipe(text: str, section: type[BaseModel]) -> tuple[Any, Lines]:
    """The tree in a recipe's text, and the line of every key by its dotted name.

    Raises:
        ValueError: the text is not YAML, or gives a key twice; one sentence with the line.
    """
    return _parse(text, lambda reader, node: reader.read(node, section, ""))


def read_value(text: str, annotation: Any) -> Any:
    """One value as typed behind `key=`, for a field of type `annotation`.

    Raises:
        ValueError: it should be a list or mapping, and is not YAML.
    """
    kinds = set(_kinds(annotation))
    opening = text.lstrip()[:1]
    if not kinds & _SCALARS or (opening in ("[", "{") and kinds & _CONTAINERS):
        return _parse(text, lambda reader, node: reader.read(node, annotation, ""))[0]
    stripped = text.strip()
    if len(stripped) > 1 and opening in QUOTES and stripped[-1] == opening:
        try:
            node = yaml.compose(stripped, Loader=_Loader)
        except yaml.YAMLError:
            node = None  # two quoted words, say: part of the text
        if isinstance(node, yaml.ScalarNode):
            return node.value
    return _scalar(text, annotation)


def type_of(section: type[BaseModel], keys: list[str]) -> Any:
    """The type of the field under `keys`, which is Any where no field has that name."""
    annotation: Any = section
    for key in keys:
        annotation = _child_type(annotation, key)
    return annotation


def is_null(text: str) -> bool:
    """Whether the text stands for no value, as one of NULLS, in upper or lower case."""
    return text.strip().lower() in NULLS


class _Reader:
    """Walks YAML's nodes beside the types of the fields they are for."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._loader = _Loader(text)
        self.lines: Lines = {}

    def document(self) -> yaml.Node | None:
        node: yaml.Node | None = self._loader.get_single_node()
        if node is not None:
            self._inspect(node, "", (), {})
        return node

    def _inspect(self, node: yaml.Node, key: str, above: tuple[yaml.Node, ...], sizes: dict[int, int]) -> int:
        """Refuses keys that stand twice, what holds itself, and bombs; returns how many values a node stands for.

        Here and not where values are made: an alias costs nothing there, and everything where a value is copied or shown.
        """
        line, column = node.start_mark.line + 1, node.start_mark.column + 1
        if any(node is outer for outer in above):
            raise Refused(
                f"line {line}, column {column}: found unconstructable recursive node; write out what it stands for"
            )
        if len(above) > MAX_DEPTH:
            raise Refused(f"line {line}: its lists and mappings are nested too deeply; {MAX_DEPTH} levels are the most")
        if (size := sizes.get(id(node))) is not None:
            return size
        prefix, size = f"{key}." if key else "", 1
        if isinstance(node, yaml.MappingNode):
            _refuse_repeated_keys(node, prefix)
            for name, value in node.value:
                inner = prefix + str(name.value if isinstance(name, yaml.ScalarNode) else "?")
                size += self._inspect(name, inner, (*above, node), sizes)
                size += self._inspect(value, inner, (*above, node), sizes)
        elif isinstance(node, yaml.SequenceNode):
            size += sum(self._inspect(item, f"{prefix}{i}", (*above, node), sizes) for i, item in enumerate(node.value))
        if size > MAX_VALUES:
            raise Refused(
                f"line {line}: {key or 'the recipe'} stands for more than {MAX_VALUES:,} values, counting what its aliases "
                "(*) repeat; write out the few that are meant"
            )
        sizes[id(node)] = size
        return size

    def read(self, node: yaml.Node | None, annotation: Any, key: str) -> Any:
        if node is None:
            return None
        self.lines[key] = node.start_mark.line + 1
        if node.tag not in _Loader.yaml_constructors and node.tag not in (_MERGE, _VALUE):
            raise ValueError(f"line {self.lines[key]}: the tag {node.tag} has no meaning here; remove it")
        kinds = set(_kinds(annotation))
        if Any in kinds:
            return self._passed_on(node, key)
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node.value, annotation) if node.style is None else node.value
        assert isinstance(node, yaml.CollectionNode)
        if str in kinds and node.flow_style and not kinds & _CONTAINERS:
            return self._text[node.start_mark.index : node.end_mark.index]  # `{question}` is a template, not a mapping
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, _item_type(annotation), f"{key}.{i}") for i, item in enumerate(node.value)]
        assert isinstance(node, yaml.MappingNode)
        return self._mapping(node, annotation, key)

    def _mapping(self, node: yaml.MappingNode, annotation: Any, key: str) -> dict[str, Any]:
        prefix = f"{key}." if key else ""
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise ValueError(f"line {name.start_mark.line + 1}: a key must be a word")
        self._loader.flatten_mapping(node)
        return {
            name.value: self.read(value, _child_type(annotation, name.value), prefix + name.value)
            for name, value in node.value
        }

    def _passed_on(self, node: yaml.Node, key: str) -> Any:
        try:
            return self._loader.construct_object(node, deep=True)
        except yaml.YAMLError:
            raise
        except (ValueError, KeyError, TypeError, ArithmeticError, AttributeError) as error:
            # YAML's constructors let pass what Python says of a text that is not of the kind it looks like, or is said to be
            reason = str(error) if isinstance(error, ValueError) else "not what its tag says"
            raise Refused(
                f"line {node.start_mark.line + 1}: {key or 'the value'} holds a value that cannot be read ({reason[:80]}); "
                "put quotes around it if it is text"
            ) from None


def _refuse_repeated_keys(node: yaml.MappingNode, prefix: str) -> None:
    first: Lines = {}
    for name, _ in node.value:
        if not isinstance(name, yaml.ScalarNode) or name.tag == _MERGE:
            continue
        line = name.start_mark.line + 1
        if name.value in first:
            raise Refused(
                f"line {line}: {prefix}{name.value} is given a second time, first in line {first[name.value]}; keep one of "
                "them"
            )
        first[name.value] = line


def describe(value: Any) -> str:
    """`repr`, also of what has none."""
    try:
        return repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; a list in itself
        return f"a {type(value).__name__} that is too long to show"


def _parse(text: str, read: Callable[[_Reader, yaml.Node | None], Any]) -> tuple[Any, Lines]:
    try:
        if _NEST.search(text):  # YAML's scanner takes seconds for what it then cannot read
            raise RecursionError
        reader = _Reader(text)
        return read(reader, reader.document()), reader.lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(
            f"{place}{error.problem or error.context}; text with : {{ [ # or a quote needs quotes"
        ) from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split()).replace('in "<unicode string>", ', "at ")
        raise ValueError(f"{reason}; write it as plain text") from None
    except RecursionError:
        raise Refused(f"its lists and mappings are nested too deeply; {MAX_DEPTH} levels are the most") from None


# -- types -------------------------------------------------------------------------------------------------------------

_CONTAINERS = {dict, list, tuple, BaseModel}
_SCALARS = {str, int, float, bool, Literal}


def _members(annotation: Any) -> Iterator[Any]:
    """The alternatives of a union, or the type itself, without annotations of their own."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        yield from _members(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _kinds(annotation: Any) -> Iterator[Any]:
    for member in _members(annotation):
        origin = typing.get_origin(member) or member
        yield BaseModel if isinstance(origin, type) and issubclass(origin, BaseModel) else origin


def _child_type(annotation: Any, key: str) -> Any:
    for member in _members(annotation):
        if typing.get_origin(member) is dict:
            return typing.get_args(member)[1]
        if isinstance(member, type) and issubclass(member, BaseModel) and key in member.model_fields:
            return member.model_fields[key].annotation
    return Any


def _item_type(annotation: Any) -> Any:
    for member in _members(annotation):
        if typing.get_origin(member) in (list, tuple):
            return typing.get_args(member)[0]
    return Any


def _scalar(text: str, annotation: Any) -> Any:
    """Unquoted text as the type takes it; what the type cannot make of it is for pydantic to refuse."""
    kinds = set(_kinds(annotation))
    if is_null(text) and (type(None) in kinds or not kinds & _SCALARS):
        return None
    if str in kinds:
        return text
    text = text.strip()
    if Literal in kinds and is_null(text):
        choices = [c for member in _members(annotation) for c in typing.get_args(member)]
        return "none" if "none" in choices else text
    return _integer(text) if int in kinds and float not in kinds else text


def _integer(text: str) -> Any:
    if len(text) > MAX_BITS + 2:  # longer than any in range, which pydantic says
        return text
    for parse in (int, lambda t: int(t, 0), float):
        try:
            number = parse(text)
        except (ValueError, OverflowError):
            continue
        if number == number // 1:
            return int(number)
    return text
