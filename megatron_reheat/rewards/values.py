"""Expressions: read by math-verify's LaTeX parser and compared as numbers, exactly or to many digits.

Two expressions with variables are equal if they are at points drawn once and for all. Nothing here rounds to an
absolute precision: 9.1e-31 is not 1.6e-19.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import verify
from sympy import (
    Abs,
    Expr,
    Float,
    I,
    Integral,
    Limit,
    MatrixBase,
    Pow,
    Rational,
    S,
    Symbol,
    UnevaluatedExpr,
    log,
    nan,
    oo,
    sign,
    zoo,
)
from sympy.core.relational import Relational
from sympy.matrices import MatrixExpr
from sympy.sets import Set

from megatron_reheat.rewards.latex import closing

# math-verify warns whenever its own timeouts are off; here the pool kills the whole process instead
logging.getLogger("math_verify").setLevel(logging.ERROR)

DIGITS = 40
NUMBERS_AGREE = Rational(1, 10**30)  # relative difference
FUNCTIONS_AGREE = Rational(1, 10**20)
MAX_EXPONENT = 4000
# what a decimal reference must have to be taken for a rounded one: see `rounds_to`
EXACT_FORM_DIGITS = 3
DECIMAL_DIGITS = 5
DECIMAL_TOLERANCE = Fraction(1, 10**5)

_SCIENTIFIC = re.compile(
    r"([-+]?(?:\d+(?:\.\d*)?|\.\d+))(?:(?:[eE]|\s*(?:\\times|\\cdot|\*)\s*10\s*\^)\s*\{?\s*([-+]?\d+)\s*\}?)?"
)
_FRACTION = re.compile(r"\s*([-+]?)\s*\\frac\{\s*(\d{1,4000})\s*\}\{\s*(\d{1,4000})\s*\}\s*")
_ARGUMENT = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<![\d.}A-Za-z])(\d+\.\d+)[eE]([-+]?\d+)(?![\dA-Za-z])", r"\1\\cdot 10^{\2}"),
        (r"(?<!\d)\.(\d)", r"0.\1"),
        (r"(\d)\.(?!\d)", r"\1"),
        (r"\^\\circ", r"^{\\circ}"),
        (r"\\text\s*\{\s*([A-Za-z])\s*\}", r" \1 "),
        (r"\\text\s*\{\s*([^{}]*?)\s*\}", r"\\text{\1}"),
        (r"\\imath(?![A-Za-z])", "i"),
        (r"([A-Za-z])('+)", r"\1_{prime}"),
        (r"(?<![A-Za-z\\])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),
    )
]
_MIXED = re.compile(r"(?<![\d.}^_A-Za-z)])(\d+)\s*\\frac\{\s*(\d+)\s*\}\{\s*(\d+)\s*\}(?!\s*[\d^])")
# where the parser would take a product of numbers for a mixed number
_PRODUCTS = (
    re.compile(rf"\\frac{_ARGUMENT}{_ARGUMENT}(?=\s*(?:\\frac|\(|\d))"),
    re.compile(r"[\d)](?=\s*\()|\)(?=\s*(?:[\dA-Za-z]|\\(?!cdot|times|div|pm|mod)))|\d(?=\s*\\(?:frac|sqrt|binom))"),
)
_TWO_NUMBERS = re.compile(r"\d\s+\d|\d\s*,\s*\d")
_LISTS = re.compile(r"\\(?:begin|gcd|lcm|max|min)")
# names that the parser takes for a differential, a trace, the imaginary unit, Euler's numbers or nothing at all
_NAMES = re.compile(
    r"(?P<command>\\(?:begin|end)\{\w+\}|\\(?:text|mathbb|mathit)\{[^{}]*\}|\\(?![gG]amma(?![A-Za-z]))[A-Za-z]+)"
    r"|(?P<d>d(?=\s*(?:[A-Za-z]|\\[a-z])))|(?P<t>t(?=r))|(?P<letter>I|[eE](?=_)|\\[gG]amma(?!\s*\())"
)
_CIS = re.compile(rf"\\cis\s*(\(|\{{|\\frac{_ARGUMENT}{_ARGUMENT}|[^\s+\-*/(){{}}]+(?:\{{[^{{}}]*\}})?)")
_POINTS = (
    "1.3716 0.8241 2.1473 1.6129 0.5827 2.7361 1.1938 3.2417 0.3719 1.9284",
    "0.6173 2.3914 1.7251 0.2938 3.1127 0.9416 2.5873 1.4562 0.7385 2.0647",
    "2.8154 1.5392 0.4736 2.2618 1.0573 0.6849 3.4126 0.8963 1.8247 0.3591",
    "-1.2837 0.7416 -2.3152 1.4783 -0.5264 2.9147 -1.7935 0.6372 -0.9481 1.1629",
    "0.5381 -1.6724 1.1943 -0.8267 2.4718 -1.3496 0.7152 -2.1835 1.5674 -0.4928",
)
POINTS = [[Rational(value) for value in line.split()] for line in _POINTS]


class Unreadable(Exception):
    """Text that is no mathematical expression."""


# -- reading ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def expression(text: str) -> Any:
    """The sympy expression or matrix that cleaned LaTeX stands for; decimals become fractions.

    Raises:
        Unreadable: it is none.
    """
    if (number := decimal(text)) is not None:
        return Rational(number.numerator, number.denominator)
    if (match := _FRACTION.fullmatch(text)) and int(match[3]):
        return Rational(int(match[1] + match[2]), int(match[3]))
    try:
        parsed = latex2sympy(
            _prepared(text.strip()),
            is_real=None,
            convert_degrees=True,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
        if isinstance(parsed, MatrixExpr):
            parsed = parsed.doit()
    except Exception as error:  # the parser and sympy raise anything on odd text
        raise Unreadable(text) from error
    if not isinstance(parsed, Expr | MatrixBase) or isinstance(parsed, Relational | Set):
        raise Unreadable(text)
    exact = {number: Rational(str(number)) for number in parsed.atoms(Float)}
    evaluated = {part: part.args[0] for part in parsed.atoms(UnevaluatedExpr)}  # gcd and lcm
    imaginary = {Symbol("i"): I} if Symbol("i") in parsed.free_symbols else {}  # else the index of a sum
    parsed = parsed.xreplace({**exact, **evaluated, **imaginary})
    parsed = parsed.replace(
        lambda part: isinstance(part, log) and len(part.args) == 2, lambda part: log(part.args[0]) / log(part.args[1])
    )
    return parsed.replace(_is_odd_root, lambda root: sign(root.base) ** root.exp.p * Abs(root.base) ** root.exp)


def _is_odd_root(part: Any) -> bool:
    """A root that is real for negative numbers too, of which sympy takes a complex one."""
    if not isinstance(part, Pow) or not part.exp.is_Rational or part.exp.q == 1 or part.exp.q % 2 == 0:
        return False
    return bool(part.base.free_symbols) or bool(part.base.is_negative)


def decimal(text: str) -> Fraction | None:
    """The exact value of a plain or scientific decimal number; None for other text, and for what no one writes out."""
    match = _SCIENTIFIC.fullmatch(text.strip())
    if match is None or len(text) > MAX_EXPONENT or abs(int(match[2] or 0)) > MAX_EXPONENT:
        return None
    return Fraction(match[1].rstrip(".")) * Fraction(10) ** int(match[2] or 0)


def _prepared(text: str) -> str:
    """What the parser reads the way it is meant."""
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    if r"\begin" not in text and r"\sqrt[" not in text:
        text = text.replace("[", "(").replace("]", ")")
    text = _MIXED.sub(_mixed, _with_cis(text))
    if _TWO_NUMBERS.search(text) and not _LISTS.search(text):
        raise Unreadable(text)
    for product in _PRODUCTS:
        text = product.sub(r"\g<0>\\cdot ", text)
    return text if r"\int" in text or r"\frac{d" in text else _NAMES.sub(_as_variable, text)


def _as_variable(match: re.Match[str]) -> str:
    if match["letter"]:
        return rf"\mathit{{{match['letter'].removeprefix(chr(92))}}}"
    return f"{{{match.group()}}}" if match["d"] or match["t"] else match.group()


def _mixed(match: re.Match[str]) -> str:
    whole, numerator, denominator = match.groups()
    joined_by = "+" if int(numerator) < int(denominator) else r"\cdot "
    return rf"({whole}{joined_by}\frac{{{numerator}}}{{{denominator}}})"


def _with_cis(text: str) -> str:
    while (match := _CIS.search(text)) is not None:
        start, end = match.span(1)
        bracketed = match[1] in ("(", "{")
        if bracketed and not (end := closing(text, start) + 1):
            raise Unreadable(text)
        angle = text[start + 1 : end - 1] if bracketed else text[start:end]
        if (degrees := re.match(r"\s*\^\{\\circ\}", text[end:])) and "circ" not in angle:
            angle, end = angle + r"^{\circ}", end + degrees.end()
        text = text[: match.start()] + rf"(\cos({angle})+i\cdot \sin({angle}))" + text[end:]
    return text


# -- comparing -------------------------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    """Whether two expressions or matrices are equal wherever both have a real value."""
    if isinstance(a, MatrixBase) or isinstance(b, MatrixBase):
        return _same_matrix(a, b)
    if a.has(nan, zoo) or b.has(nan, zoo):
        return False
    if a == b:
        return True
    if a.has(oo, -oo) or b.has(oo, -oo):
        return bool(a.doit() == b.doit())
    if a.is_Rational and b.is_Rational:
        return False
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if not symbols:
        return _same_number(a, b)
    return len(symbols) <= len(POINTS[0]) and _same_function(a, b, symbols)


def _same_matrix(a: Any, b: Any) -> bool:
    if not isinstance(a, MatrixBase) or not isinstance(b, MatrixBase) or a.shape != b.shape:
        return False
    return all(same(x, y) for x, y in zip(a.flat(), b.flat(), strict=True))


def _same_number(a: Expr, b: Expr) -> bool:
    a, b = evaluated(a), evaluated(b)
    if a is None or b is None:
        return False
    if a.is_Rational and b.is_Rational:
        return bool(a == b)
    return S.Zero not in (a, b) and bool(Abs(a - b) <= NUMBERS_AGREE * Abs(a))


def evaluated(value: Expr) -> Expr | None:
    """A rational number where that is what the expression comes to, else a number of `DIGITS` digits; None if neither."""
    try:
        if value.has(Limit, Integral):
            value = value.doit()
        approximate = value.evalf(DIGITS)
        if approximate.is_Number and getattr(approximate, "_prec", 0) == 1:
            return S.Zero
        if not approximate.is_number or approximate.has(nan, zoo, oo, -oo):
            return None
        if Abs(approximate) < 10**MAX_EXPONENT and (exact := value.doit()).is_Rational:
            return exact
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        return None
    return approximate


def _same_function(a: Expr, b: Expr, symbols: list[Symbol]) -> bool:
    compared = False
    for point in POINTS:
        at = dict(zip(symbols, point, strict=False))
        x, y = _value_at(a, at), _value_at(b, at)
        if x is None or y is None:
            continue
        if Abs(x - y) > FUNCTIONS_AGREE * (Abs(x) + Abs(y)):
            return False
        compared = True
    return compared or bool(verify(a, b, timeout_seconds=None))


def _value_at(side: Expr, at: dict[Symbol, Rational]) -> Expr | None:
    """Its value at a point; None where it has none in the real numbers, or cannot be evaluated."""
    try:
        if any(value < 0 for value in at.values()) and _leaves_the_reals(side, at):
            return None
        value = side.xreplace(at).evalf(DIGITS)
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        return None
    return value if value.is_number and not value.has(nan, zoo, oo, -oo) else None


def _leaves_the_reals(side: Expr, at: dict[Symbol, Rational]) -> bool:
    """Whether it takes a root or a logarithm of a negative number there."""
    rooted = [part.base for part in side.atoms(Pow) if part.exp.doit().is_integer is not True]
    bases = [*rooted, *(part.args[0] for part in side.atoms(log))]
    return any(not base.xreplace(at).evalf(10).is_nonnegative for base in bases if base.free_symbols)


def rounds_to(reference: str, answer: Expr, answer_text: str) -> bool:
    """Whether the reference is a decimal number that the more precise answer rounds to.

    A reference of few digits may well be exact, so that 2.54 is not 2.5 nor 1/3 0.3. An answer in exact form needs
    three significant digits to agree with, another decimal number five and a relative difference below 1e-5.
    """
    rounded, precise = decimal(reference), decimal(answer_text)
    mantissa = re.match(r"[-+]?(\d*)\.(\d*)", reference.strip())
    if rounded is None or mantissa is None or rounded.denominator == 1:
        return False
    digits = len((mantissa[1] + mantissa[2]).lstrip("0"))
    if digits < (EXACT_FORM_DIGITS if precise is None else DECIMAL_DIGITS):
        return False
    value = precise if precise is not None else _near(answer)
    if value is None or (precise is not None and abs(precise - rounded) > DECIMAL_TOLERANCE * abs(rounded)):
        return False
    return abs(value - rounded) <= Fraction(10) ** (_first_place(rounded) - digits + 1) / 2


def _near(value: Expr) -> Fraction | None:
    number = None if value.free_symbols else evaluated(value)
    if number is None or not number.is_real:
        return None
    exact = Rational(number)
    return Fraction(int(exact.p), int(exact.q))


def _first_place(value: Fraction) -> int:
    """The power of ten of the first significant digit."""
    exponent = len(str(abs(value.numerator))) - len(str(value.denominator))
    return exponent if abs(value) >= Fraction(10) ** exponent else exponent - 1
