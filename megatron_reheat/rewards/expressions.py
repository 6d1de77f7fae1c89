"""Arithmetic and algebra in a model's answer, read by a grammar of our own.

    sum    = product { ("+" | "-") product }
    product = factor { ("*" | "/") factor }
    factor = ("+" | "-") factor | power
    power  = atom [ "**" factor ]                                      (algebra only)
    atom   = number | name | function "(" sum ")" | "(" sum ")"        (arithmetic: whole numbers and brackets)

Python's spelling, its precedence, and nothing else of it: no comments, keywords, comparisons, attributes, strings, underscores,
leading zeros or other scripts' digits. No part of an answer is handed to `eval` or to sympy's parser, which evaluates.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import sympy

MAX_CHARS = 2000
MAX_DEPTH = 60
MAX_EXPONENT = 200
MAX_POWER_BITS = 20_000

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d{1,50}(?:\.\d{0,50})?|\.\d{1,50})|(?P<name>[A-Za-z][A-Za-z0-9_]{0,30})|(?P<sign>\*\*|[-+*/()]))",
    re.ASCII,
)
_WHOLE = re.compile(r"0|[1-9]\d*")
_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    **{name: getattr(sympy, name) for name in ("exp", "log", "ln", "sqrt", "Abs")},
    **{name: getattr(sympy, name) for name in ("sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan")},
    **{name: getattr(sympy, name) for name in ("sinh", "cosh", "tanh", "asinh", "acosh", "atanh")},
}
_CONSTANTS = {"pi": sympy.pi, "E": sympy.E}


class NotInGrammar(ValueError):
    """The text is no expression of the grammar, or one too large to compute with."""


@dataclass(frozen=True)
class Arithmetic:
    """An expression's exact value and the numbers written in it, in order."""

    value: Fraction
    numbers: tuple[int, ...]


def arithmetic(text: str) -> Arithmetic:
    """Whole numbers, `+ - * /` and brackets, computed exactly.

    Raises:
        NotInGrammar: anything else, a division by zero too.
    """
    numbers: list[int] = []

    def number(literal: str) -> Fraction:
        if not _WHOLE.fullmatch(literal):
            raise NotInGrammar(f"{literal} is no whole number")
        numbers.append(int(literal))
        return Fraction(numbers[-1])

    value = _Reader(text, number).whole()
    return Arithmetic(value, tuple(numbers))


def algebra(text: str, functions: bool = True) -> sympy.Expr:
    """The sympy expression of numbers, names, `+ - * / **`, brackets and, with `functions`, elementary ones of one argument.

    A name is a symbol, but for `pi` and `E` with `functions`.

    Raises:
        NotInGrammar: anything else, also a power too large to be meant, and what has no finite value.
    """

    def name(word: str) -> sympy.Expr:
        return _CONSTANTS[word] if functions and word in _CONSTANTS else sympy.Symbol(word)

    value = _Reader(text, _sympy_number, name, _FUNCTIONS if functions else {}, _power).whole()
    if value.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo):
        raise NotInGrammar("the expression has no finite value")
    return value


def _sympy_number(literal: str) -> sympy.Expr:
    if "." in literal:
        return sympy.Float(literal)
    if not _WHOLE.fullmatch(literal):
        raise NotInGrammar(f"{literal} begins with a zero")
    return sympy.Integer(int(literal))


def _power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    if exponent.is_number:
        if not isinstance(exponent, sympy.Rational | sympy.Float) or abs(exponent) > MAX_EXPONENT:
            raise NotInGrammar(f"an exponent beyond {MAX_EXPONENT}")
        if isinstance(base, sympy.Rational):
            bits = max(int(base.p).bit_length(), int(base.q).bit_length())
            if bits * abs(exponent) > MAX_POWER_BITS:
                raise NotInGrammar(f"a power of more than {MAX_POWER_BITS} bits")
    return base**exponent


class _Reader:
    """Recursive descent over one text, computing as it reads; without `name` or `power` the grammar has none."""

    def __init__(
        self,
        text: str,
        number: Callable[[str], Any],
        name: Callable[[str], Any] | None = None,
        functions: dict[str, Callable[[Any], Any]] | None = None,
        power: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        self._tokens = _tokens(text)
        self._at = 0
        self._depth = 0
        self._number, self._name, self._functions, self._raise_to = number, name, functions or {}, power

    def whole(self) -> Any:
        try:
            value = self._sum()
        except ZeroDivisionError:
            raise NotInGrammar("a division by zero") from None
        if self._at < len(self._tokens):
            raise NotInGrammar(f"{self._tokens[self._at][1]} where the expression should end")
        return value

    def _next_is(self, *signs: str) -> str | None:
        """Takes the next token if it is one of these signs."""
        if self._at < len(self._tokens) and self._tokens[self._at][1] in signs:
            self._at += 1
            return self._tokens[self._at - 1][1]
        return None

    def _sum(self) -> Any:
        value = self._product()
        while sign := self._next_is("+", "-"):
            value = _OPERATIONS[sign](value, self._product())
        return value

    def _product(self) -> Any:
        value = self._factor()
        while sign := self._next_is("*", "/"):
            value = _OPERATIONS[sign](value, self._factor())
        return value

    def _factor(self) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise NotInGrammar(f"nested more than {MAX_DEPTH} deep")
        if sign := self._next_is("+", "-"):
            value = self._factor()
            value = -value if sign == "-" else value
        else:
            value = self._atom()
            if self._raise_to is not None and self._next_is("**"):
                value = self._raise_to(value, self._factor())
        self._depth -= 1
        return value

    def _atom(self) -> Any:
        if self._next_is("("):
            return self._closed()
        kind, token = self._tokens[self._at] if self._at < len(self._tokens) else ("", "the end")
        self._at += 1
        if kind == "number":
            return self._number(token)
        if kind == "name" and self._next_is("("):
            if token not in self._functions:
                raise NotInGrammar(f"{token} is no function of the grammar")
            return self._functions[token](self._closed())
        if kind == "name" and self._name is not None:
            return self._name(token)
        raise NotInGrammar(f"{token} where a value should be")

    def _closed(self) -> Any:
        value = self._sum()
        if not self._next_is(")"):
            raise NotInGrammar("a bracket is left open")
        return value


def _tokens(text: str) -> list[tuple[str, str]]:
    """(kind, text) of every token.

    Raises:
        NotInGrammar: something between them is none.
    """
    text = text.strip()
    if len(text) > MAX_CHARS:
        raise NotInGrammar(f"longer than {MAX_CHARS} characters")
    tokens, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            raise NotInGrammar(f"{text[at : at + 10]!r} is no token of the grammar")
        tokens.append((match.lastgroup, match[match.lastgroup]))
        at = match.end()
    return tokens
