"""Intervals, unions, inequalities and named sets of numbers, as sympy's sets."""

from __future__ import annotations

from typing import Any

from sympy import (
    EmptySet,
    FiniteSet,
    Integers,
    Intersection,
    Interval,
    Naturals,
    Rationals,
    Reals,
    Set,
    Symbol,
    Union,
    solveset,
)
from sympy.core.relational import Relational
from sympy.sets.fancysets import Complexes

from megatron_reheat.rewards.answers import Answer, Group, NamedSet, Operation, Relation, Value, read
from megatron_reheat.rewards.equations import constant_factor
from megatron_reheat.rewards.values import Unreadable, expression, same

_NAMED = {"R": Reals, "Z": Integers, "N": Naturals, "Q": Rationals, "C": Complexes()}
_RELATIONALS = {"=": "==", r"\approx": "==", r"\ne": "!=", "<": "<", ">": ">", r"\le": "<=", r"\ge": ">="}


def is_set(answer: Answer) -> bool:
    """Whether only a set of numbers can be equal to it; a pair in brackets may be a point as well."""
    if isinstance(answer, Group) and not answer.brackets:
        return any(isinstance(item, Relation) and not item.is_equation for item in answer.items)
    if isinstance(answer, Relation):
        return not answer.is_equation
    return isinstance(answer, NamedSet | Operation)


def same_set(wanted: Answer, given: Answer) -> bool:
    """Whether both are the same set; two inequalities must be about the same variable.

    Raises:
        Unreadable: one is no set.
    """
    variables = [_variables(side) for side in (wanted, given)]
    if all(variables) and variables[0] != variables[1]:
        return False
    if any(len(names) > 1 for names in variables):
        return _same_inequality(wanted, given)
    try:
        a, b = _as_set(wanted), _as_set(given)
        return bool(a == b) or bool(a.symmetric_difference(b) == EmptySet)
    except (TypeError, ValueError, NotImplementedError, AttributeError) as error:  # sympy on odd sets
        raise Unreadable(str(error)) from error


def _variables(answer: Answer) -> set[str]:
    if isinstance(answer, Group):
        return {name for item in answer.items for name in _variables(item)}
    if not isinstance(answer, Relation):
        return set()
    sides = [side.replace(r"\pm", "") for side in answer.sides]
    return {str(symbol) for side in sides for symbol in expression(side).free_symbols}


def _as_set(answer: Answer) -> Set:
    match answer:
        case NamedSet(letter):
            return _NAMED[letter]
        case Operation(sign, left, right):
            a, b = _as_set(left), _as_set(right)
            return Union(a, b) if sign == r"\cup" else Intersection(a, b) if sign == r"\cap" else a - b
        case Relation(sides, signs):
            pairs = zip(sides, signs, sides[1:], strict=False)
            return Intersection(Reals, *(_solutions(*pair) for pair in pairs))
        case Group("{}", items):
            return FiniteSet(*map(_number, items))
        case Group("", items):
            parts = [_as_set(item) for item in items]
            common = Intersection(*parts)
            # x<0, x>1 are two pieces; x>0, x<1 are two conditions
            return Union(*parts) if answer.joined_by == "or" or common == EmptySet else common
        case Group(brackets, (first, last)):
            start, end = _number(first), _number(last)
            if (start - end).is_positive:
                raise Unreadable("an interval from right to left")
            return Interval(start, end, brackets[0] == "(", brackets[1] == ")")
    raise Unreadable("no set of numbers")


def _number(answer: Answer) -> Any:
    return expression(_text(answer))


def _text(answer: Answer) -> str:
    return answer.text if isinstance(answer, Value) else ""


def _solutions(left: str, sign: str, right: str) -> Set:
    r"""Of an equation or inequality in one variable."""
    if isinstance(values := read(right), Group):  # x \ne \pm 1
        solutions = Union(*(_solutions(left, "=", _text(value)) for value in values.items))
        return Reals - solutions if sign == r"\ne" else solutions
    a, b = expression(left), expression(right)
    (name,) = (a - b).free_symbols
    x = Symbol("x", real=True)
    a, b = a.subs(name, x), b.subs(name, x)
    if sign == r"\ne":
        return Reals - solveset(a - b, x, Reals)
    return solveset(Relational(a, b, _RELATIONALS[sign]), x, Reals)


def _same_inequality(wanted: Answer, given: Answer) -> bool:
    """Of several variables: the difference of the sides, up to a positive factor."""
    if not isinstance(wanted, Relation) or not isinstance(given, Relation):
        return False
    (a, kind), (b, other_kind) = _difference(wanted), _difference(given)
    factor = constant_factor(a, b)
    if factor is None or kind != other_kind or (factor.is_negative and kind != "!="):
        return False
    return same(a, factor * b)


def _difference(inequality: Relation) -> tuple[Any, str]:
    """Which expression is positive, not negative or not zero."""
    if len(inequality.sides) > 2:
        raise Unreadable("a chain of inequalities in several variables")
    a, b = map(expression, inequality.sides)
    sign = _RELATIONALS[inequality.signs[0]]
    return (b - a, sign.replace("<", ">")) if sign[0] == "<" else (a - b, sign)
