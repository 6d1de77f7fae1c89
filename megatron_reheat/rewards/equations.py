"""What an equation says the answer is, and when two of them say the same."""

from __future__ import annotations

import itertools
import re
from typing import Any

from sympy import Integer

from megatron_reheat.rewards.answers import Answer, Relation, Value, read
from megatron_reheat.rewards.values import Unreadable, expression, same

_LETTER = r"(?:\\(?!frac|sqrt|pi|sin|cos|tan|cot|log|ln)[A-Za-z]+(?:\{\w+\})?|[A-Za-z])(?:_\{[^{}]*\})?'*"
_NAME = re.compile(
    "|".join(
        (
            _LETTER,
            rf"{_LETTER}(?:\^\{{-?\d\}})?\s*(?:\([^()]*\)|\[[^\[\]]*\])",  # f^{-1}(x), P(A), E[X]
            r"(?:\\text\{[^{}]*\}\s*)+(?:[A-Za-z]{0,4}|\([^()]*\))",  # \text{Area}, \text{Re}(z)
            rf"\\(?:sin|cos|tan|cot|sec|csc|ln|log(?:_\{{\w+\}})?)\s*\(?\s*{_LETTER}\s*\)?",
            r"(?:m\s*)?(?:\\(?:angle|triangle|overline)\s*)?\{?[A-Z]{1,4}\}?|\|[A-Z]{1,2}\||\[[A-Z]{3,}\]",  # AB, \angle A
            r"\([A-Za-z_{}\d', \\]+\)",  # (x,y)
            r"\\(?:int|lim)(?![A-Za-z]).*|\\frac\{d.*\}\{d.*\}.*",
            rf"\\?\|(?!x\|){_LETTER}\\?\|",  # |z|
        )
    )
)
_APPLIED = re.compile(r"([A-Za-z])\(([A-Za-z])\)")


def has_name(equation: Relation) -> bool:
    """Whether it gives a value to something that has a name, as `x=5`, `f(x)=2x` and `AB=3` do."""
    return equation.is_equation and _is_name(equation.sides[0])


def states_value(equation: Relation) -> bool:
    """Whether an answer may give its last side alone: it has a name, or is arithmetic as in 3+4=7."""
    return has_name(equation) or (equation.is_equation and _symbols(equation.sides[0]) == set())


def stated_values(equation: Relation) -> list[Answer]:
    """What an equation that answers a question for a value says it is: its last side, as a rule.

    An equation that is still to be solved (`2x=10`) says none.
    """
    if not equation.is_equation:
        return []
    values = [read(equation.sides[-1])]
    if has_name(equation):
        pass
    elif len(equation.sides) == 2 and _is_name(equation.sides[-1]):
        return [read(equation.sides[0])]  # 5 = x
    elif (names := _symbols(equation.sides[0])) is not None and len(names) == 1:
        return []
    elif names == set() and "=" in equation.signs and not _is_true(equation):
        return []  # 3+3=7
    if equation.signs[-1] == r"\approx":
        values.append(read(equation.sides[-2]))
    return values


def names_differ(wanted: Relation, given: Relation) -> bool:
    """Whether two equations give values to different things: x and y, but not f(x) and y."""
    a, b = (re.sub(r"\s+", "", side.sides[0]) for side in (wanted, given))
    return a != b and not any("(" in name or "text" in name for name in (a, b))


def with_argument_of(wanted: Relation, given: Relation) -> str | None:
    """The last side of `f(n)=n` as it is for `f(x)=x`; None if the equations define no function of the same name."""
    a, b = (_APPLIED.fullmatch(re.sub(r"\s+", "", side.sides[0])) for side in (wanted, given))
    if a is None or b is None or a[1] != b[1]:
        return None
    return re.sub(rf"(?<![A-Za-z\\]){b[2]}(?![A-Za-z])", a[2], given.sides[-1])


def same_curve(wanted: Relation, given: Relation) -> bool:
    """Whether the difference of the sides is the same up to a constant factor.

    Raises:
        Unreadable: a side is no expression.
    """
    try:
        a, b = (expression(side.sides[0]) - expression(side.sides[-1]) for side in (wanted, given))
    except TypeError:  # a matrix and a number
        return False
    factor = constant_factor(a, b)
    return factor is not None and same(a, factor * b)


def constant_factor(a: Any, b: Any) -> Any:
    """What `a / b` is at one point, None if it is nothing there or the two do not have the same variables."""
    symbols = sorted(a.free_symbols, key=str)
    if not symbols or a.free_symbols != b.free_symbols:
        return None
    factor = (a / b).subs({symbol: Integer(2) + Integer(i) / 7 for i, symbol in enumerate(symbols)})
    return factor if factor.is_number and factor.is_finite and not factor.is_zero else None


def _is_true(equation: Relation) -> bool:
    """Whether the sides of an equation between numbers are equal, as far as it does not say that they are only nearly so."""
    exact = equation.sides[: equation.signs.index(r"\approx") + 1] if r"\approx" in equation.signs else equation.sides
    try:
        return all(same(expression(left), expression(right)) for left, right in itertools.pairwise(exact))
    except Unreadable:
        return False


def _is_name(side: str) -> bool:
    return _NAME.fullmatch(side.strip()) is not None


def _symbols(side: str) -> set[Any] | None:
    """The variables of an expression; None if it is none."""
    answer = read(side)
    try:
        return set(expression(answer.text).free_symbols) if isinstance(answer, Value) else None
    except Unreadable:
        return None
