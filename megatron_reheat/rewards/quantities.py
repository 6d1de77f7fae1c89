"""Values with their units against each other, and what is made of values: ratios, residues, points that are vectors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sympy import Integer

from megatron_reheat.rewards.answers import Answer, Group, Residue, Value
from megatron_reheat.rewards.units import DEGREE, parse_unit
from megatron_reheat.rewards.values import expression, rounds_to, same


def same_quantity(wanted: Value, given: Value) -> bool:
    """Equal in base units; where one side names no unit its number may be meant in the other's.

    Raises:
        Unreadable: one is no expression.
    """
    wanted, given = _with_unit_of(given, wanted), _with_unit_of(wanted, given)
    a, b = _measured(wanted), _measured(given)
    if a[1] and b[1]:
        return a[1] == b[1] and same(a[0], b[0])
    is_bare = not a[1] or not b[1]
    if is_bare and not _is_in_radians(wanted, given) and _same_number(wanted, given):
        return True
    return any(side.unit is not None and side.unit.is_number for side in (wanted, given)) and same(a[0], b[0])


def proportional(wanted: Sequence[Answer], given: Sequence[Answer]) -> bool:
    """Whether two ratios of as many parts are the same; raises as `same_quantity`."""
    if len(wanted) != len(given):
        return False
    a, b = ([expression(_text(part)) for part in side] for side in (wanted, given))
    return not same(a[0], Integer(0)) and all(same(x * b[0], y * a[0]) for x, y in zip(a, b, strict=True))


def congruent(wanted: Residue, given: Residue) -> bool:
    """Whether two residues are the same class; raises as `same_quantity`."""
    difference = expression(_text(wanted.value)) - expression(_text(given.value))
    return wanted.modulus == given.modulus and bool(difference % expression(wanted.modulus) == 0)


def same_vector(matrix: Value, point: Group) -> bool:
    """Whether a column or row is the point of the same coordinates; raises as `same_quantity`."""
    vector = expression(matrix.text)
    if 1 not in getattr(vector, "shape", ()) or len(vector) != len(point.items):
        return False
    return all(same(expression(_text(item)), entry) for item, entry in zip(point.items, vector, strict=True))


def _text(answer: Answer) -> str:
    return answer.text if isinstance(answer, Value) else ""


def _measured(value: Value) -> tuple[Any, tuple[tuple[str, int], ...]]:
    """In base units, with what it measures."""
    if value.sum_of:
        parts = [_measured(part) for part in value.sum_of]
        return sum((part for part, _ in parts), Integer(0)), parts[0][1]
    if value.unit is None:
        return expression(value.text), ()
    return expression(value.text) * value.unit.factor * value.unit.scale, value.unit.measures


def _with_unit_of(model: Value, value: Value) -> Value:
    """`10cm` and `5 m`, products of variables unless the other side has just that unit."""
    if model.unit is None or value.unit is not None:
        return value
    match = re.fullmatch(r"(.*[\d}])\s*([A-Za-z]+)", value.text)
    return Value(match[1], model.unit) if match and parse_unit(match[2]) == model.unit else value


def _is_in_radians(wanted: Value, given: Value) -> bool:
    r"""Whether one side is in degrees and the other, without a unit, is `\pi/2` or the like."""
    degrees, bare = (wanted, given) if wanted.unit else (given, wanted)
    return degrees.unit == DEGREE and r"\pi" in bare.text


def _same_number(wanted: Value, given: Value) -> bool:
    """Without the units: 15 is 15%, but 0.15 is not 0.15%."""
    scales = [side.unit.scale if side.unit else 1 for side in (wanted, given)]
    is_percentage = given.unit is not None and given.unit.measures == (("percent", 1),) and wanted.unit is None
    for a in _readings(wanted.text):
        for b in _readings(given.text):
            if is_percentage and b.is_number and abs(b) < 1:
                continue
            if same(a * scales[0], b * scales[1]):
                return True
            if scales == [1, 1] and rounds_to(wanted.text, b, given.text):
                return True
    return False


def _readings(text: str) -> list[Any]:
    """Two of `2e-3`: the decimal number, and 2 times e less 3."""
    euler = re.sub(r"(\d)\s*([eE])(?=[-+])", r"\1{\2}", text)
    return [expression(text)] if euler == text else [expression(text), expression(euler)]
