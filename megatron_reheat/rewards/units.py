r"""Units of answers: what follows a number in `\text{...}`, as a factor and what it measures.

An answer may leave out the reference's unit or name one that the reference leaves out; two units that are both there
must measure the same. Nouns that are no units (`12 \text{ apples}`) are units of their own.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from sympy import Expr, Integer, Rational, pi

from megatron_reheat.rewards.latex import word_set
from megatron_reheat.rewards.prose import ARTICLES, NEGATING


@dataclass(frozen=True)
class Unit:
    """A number with this unit is `factor` times as much of `measures`, base units with their exponents.

    `scale` multiplies the number itself (`million`), whether or not another answer has a unit.
    """

    factor: Expr
    measures: tuple[tuple[str, int], ...] = ()
    scale: int = 1

    @property
    def is_number(self) -> bool:
        """Whether the unit stands for a plain number, as those of percentages and angles do."""
        return self.measures in ((("percent", 1),), (("radian", 1),))


# {what it measures: {names of a unit: its size}}; plurals are found by their ending
_SIZES: dict[str, dict[str, str]] = {
    "length": {
        "nm nanometer": "1e-9", "mm millimeter millimetre": "1/1000", "cm centimeter centimetre": "1/100",
        "dm decimeter decimetre": "1/10", "m meter metre": "1", "km kilometer kilometre": "1000", "in inch": "0.0254",
        "ft foot feet": "0.3048", "yd yard": "0.9144", "mi mile": "1609.344",
    },
    "mass": {
        "mg milligram": "1/1000", "g gm gram": "1", "kg kilogram": "1000", "lb lbs pound": "453.59237",
        "oz ounce": "28.349523125", "ton tonne": "1000000",
    },
    "time": {
        "ms millisecond": "1/1000", "s sec second": "1", "min minute": "60", "h hr hour": "3600", "day": "86400",
        "week": "604800", "month": "2629800", "year yr": "31557600",
    },
    # litres and the like; in cubic metres as lengths have them
    "volume": {"ml milliliter millilitre": "1e-6", "l liter litre": "1e-3", "gal gallon": "0.003785411784",
               "qt quart": "0.000946352946", "pt pint": "0.000473176473"},
    "dollar": {"dollar usd": "1", "cent": "1/100"}, "euro": {"euro eur": "1"}, "gbp": {"gbp": "1"},
    "percent": {"percent percentage pct %": "1/100"},
    "force": {"n newton": "1"}, "energy": {"j joule": "1"}, "power": {"w watt": "1"}, "voltage": {"v volt": "1"},
    "celsius": {"degc celsius": "1"}, "fahrenheit": {"degf fahrenheit": "1"},
}  # fmt: skip
_UNITS: dict[str, tuple[str, Expr]] = {
    name: (measure, Rational(size))
    for measure, names in _SIZES.items()
    for key, size in names.items()
    for name in key.split()
}
_UNITS |= dict.fromkeys(("degree", "deg"), ("radian", pi / 180))
_UNITS |= dict.fromkeys(("radian", "rad"), ("radian", Integer(1)))
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_IGNORED = word_set("unit approximately approx about only exactly total altogether") | ARTICLES
_REWRITTEN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\frac\s*\{((?:[^{}]|\{[^{}]*\})*)\}\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1/\2"),
        (r"\\text\s*\{([^{}]*)\}", r" \1 "),
        (r"\\cdot|\\times|[()]", " "),
        (r"\bper\b", "/"),
        (r"\b(\w+)\s+squared\b", r"square \1"),
        (r"\b(\w+)\s+cubed\b", r"cubic \1"),
        (r"(?:\bdegrees?\s+|\^\\circ\s*)(?:celsius|c\b)", "degc"),
        (r"(?:\bdegrees?\s+|\^\\circ\s*)(?:fahrenheit|f\b)", "degf"),
        (r"\^\\circ", " degree "),
        (r"\\%", " % "),
        (r"\bmph\b", "mile/hour"),
        (r"\b(?:kmh|kph|kmph)\b", "km/hour"),
    )
]
_FACTOR = re.compile(r"(?P<over>/)|(?P<word>[A-Za-z-]+|%)(?:\s*\^\s*\{?\s*(?P<power>-?\d+)\s*\}?)?|(?P<rest>\S)")


def parse_unit(phrase: str) -> Unit | None:
    r"""`\text{cm}^{2}`, `\text{miles per hour}`, `\text{apples}`, `\%`; None if the phrase is no unit."""
    phrase = phrase.lower().replace(".", " ")
    for pattern, replacement in _REWRITTEN:
        phrase = pattern.sub(replacement, phrase)
    factor, scale, sign, power = Integer(1), 1, 1, 1
    measures: Counter[str] = Counter()
    for match in _FACTOR.finditer(phrase):
        word = match["word"] or ""
        if match["rest"] or word in NEGATING:
            return None
        if match["over"]:
            sign = -1
        elif word in _POWERS:
            power = _POWERS[word]
        elif word in _SCALES:
            scale *= _SCALES[word]
        elif _singular(word) in _IGNORED and phrase.strip() != "a":  # amperes
            power = 1
        else:
            measure, size = _measure(word)
            exponent = sign * power * int(match["power"] or 1)
            measures["length" if measure == "volume" else measure] += exponent * (3 if measure == "volume" else 1)
            factor *= size**exponent
            sign, power = 1, 1
    return Unit(factor, tuple(sorted((measure, n) for measure, n in measures.items() if n)), scale)


def is_unit_word(word: str) -> bool:
    """Whether a bare word behind a number is taken for its unit."""
    return (
        _singular(word.lower()) in _UNITS or word.lower() in _UNITS or word.lower() in {"mph", "kph", "kmh", *_SCALES}
    )


def _measure(word: str) -> tuple[str, Expr]:
    return _UNITS.get(word) or _UNITS.get(_singular(word)) or (_singular(word), Integer(1))


def _singular(word: str) -> str:
    for ending, singular in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("ss", "ss"), ("s", "")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word.removesuffix(ending) + singular
    return word


PERCENT = Unit(Rational(1, 100), (("percent", 1),))
DEGREE = Unit(pi / 180, (("radian", 1),))
