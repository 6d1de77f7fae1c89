r"""What kind of answer a piece of cleaned LaTeX is: a value with its unit, a set, a point, an equation, words, ..."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from megatron_reheat.rewards.latex import closing, unbraced
from megatron_reheat.rewards.prose import NUMBERS, TEXT, Words, listed, without_prose, words
from megatron_reheat.rewards.units import DEGREE, PERCENT, Unit, is_unit_word, parse_unit


@dataclass(frozen=True)
class Value:
    """An expression, `text`, times its unit. `sum_of` holds the parts of a compound as 5 hours 30 minutes."""

    text: str
    unit: Unit | None = None
    sum_of: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Based:
    """Digits without leading zeros in a base that is written behind them."""

    digits: str
    base: int


@dataclass(frozen=True)
class Clock:
    """A time of the day; `half` is am, pm or empty."""

    numbers: tuple[int, ...]
    half: str


@dataclass(frozen=True)
class Ratio:
    """Two or more answers with colons between them."""

    parts: tuple[Answer, ...]


@dataclass(frozen=True)
class Residue:
    """A value modulo `modulus`, which is text."""

    value: Answer
    modulus: str


@dataclass(frozen=True)
class Group:
    """Several answers: in braces ("{}"), in brackets that stand for a point or an interval ("()", "[)", ...), or bare ("")."""

    brackets: str
    items: tuple[Answer, ...]
    joined_by: str = ","


@dataclass(frozen=True)
class NamedSet:
    """A set of numbers by its letter, of R, Z, N, Q and C."""

    letter: str


@dataclass(frozen=True)
class Operation:
    r"""`\cup`, `\cap` or `\setminus` between two sets."""

    sign: str
    left: Answer
    right: Answer


@dataclass(frozen=True)
class Relation:
    """A chain `sides[0] signs[0] sides[1] ...`; a sign is one of = < > \\le \\ge \\ne \\approx."""

    sides: tuple[str, ...]
    signs: tuple[str, ...]

    @property
    def is_equation(self) -> bool:
        """Whether no sign orders or excludes; approximate equality counts as equality."""
        return all(sign in ("=", "\\approx") for sign in self.signs)


@dataclass(frozen=True)
class Unread:
    """Nothing of the above; right only if the reference is the same text."""

    text: str


Answer = Value | Based | Words | Clock | Ratio | Residue | Group | NamedSet | Operation | Relation | Unread

EMPTY_SET = Group("{}", ())

_PHRASES: dict[str, Answer] = {
    "empty set": EMPTY_SET, "all real numbers": NamedSet("R"), "all reals": NamedSet("R"), "real numbers": NamedSet("R"),
    "all integers": NamedSet("Z"), "infinity": Value(r"\infty"), "dne": Words(("does", "not", "exist")),
}  # fmt: skip
_NO_SOLUTION = re.compile(r"(?:there (?:is|are) )?no (?:real )?(?:solution|root)s?")
_EXCEPT = re.compile(r"\\text\{all real(?: number)?s except(?: for)?\}\s*(.+)")
_CLOCK = re.compile(r"(\d{1,2}):([0-5]\d)(?::([0-5]\d))?\s*(?:(?:\\text\{\s*)?([ap])\.?\s?m\.?\s*\}?)?", re.IGNORECASE)
_BASED = re.compile(r"\(?([0-9A-Za-z.]+)\)?_\{(\d+|[a-z]+)\}")
_BASED_IN_WORDS = re.compile(r"(\w+)\s*\(?\s*\\text\{\s*(?:in\s+)?base\s*(\w*)\s*\}\s*(\d*)\s*\)?")
_RESIDUE = re.compile(
    r"(.+?)\s*(?:\\pmod\s*\{?\s*(\w+)\s*\}?|\(\s*(?:\\mod|\\bmod|\\text\{mod\})\s*\{?\s*(\w+)\s*\}?\s*\))"
)
_BUILDER = re.compile(r"\\\{\s*([A-Za-z])\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:\||:)\s*(.+)\\\}")
_MEMBER = re.compile(r"(?:[A-Za-z](?:_\{\w+\})?|\([A-Za-z, ]+\))\s*\\in(?![A-Za-z])\s*(.+)")
_ANY_INTEGER = re.compile(
    r"[,;]?\s*\(?\s*(?:\\text\{(?:where|for|with|and)[^{}]*\}\s*)?([a-z])\s*"
    r"(?:\\in\s*\\mathbb\{[ZN]\}|\\text\{is (?:an|any) integer\})\s*\)?$"
)
_POINT = re.compile(r"[A-Z]'?\s*(?:=\s*)?(\(.*,.*\))")
_SIGN = re.compile(r"\\(?:le|ge|ne|approx|equiv|simeq)(?![A-Za-z])|[=<>]")
_SET_SIGN = re.compile(r"\\(?:cup|cap|setminus)(?![A-Za-z])")
_CONNECTOR = re.compile(r"[,;]|\\(?:lor|vee|land|wedge)(?![A-Za-z])|\\text\{(?:and|or)\}|\\\\")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|cis)")
_TEMPERATURE = re.compile(r"\^\\circ\s*(?:\\text\{\s*)?[CF]\b")
_UNIT_START = re.compile(rf"{TEXT}|\\?%|{_TEMPERATURE.pattern}|\\frac\s*\{{\s*\\text")
_NUMBER = r"[-+]?(?:\d+(?:\.\d+)?(?:\s*\\frac\{\d+\}\{\d+\})?|\\frac\{\d+\}\{\d+\}|\d+/\d+)"
_POWER = r"(?:\^\{\d\})?"
_BARE_UNIT = re.compile(
    rf"({_NUMBER}|.*(?:\\pi|\}}))\s+((?:[A-Za-z]{{2,}}|[A-Za-z](?=\s*/)){_POWER}(?:\s*/\s*[A-Za-z]+{_POWER})?)"
)
_QUANTITY = re.compile(rf"({_NUMBER})\s*((?:{TEXT}|[A-Za-z]{{2,}})\s*)(?:\\text\{{and\}})?")


@lru_cache(maxsize=4096)
def read(text: str) -> Answer:
    """The first kind that fits, of a fixed order: what is specific comes first."""
    text = without_prose(unbraced(text))
    for reader in _READERS:
        if (answer := reader(text)) is not None:
            return answer
    return Unread(text)


def split(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """Parts and separators of what stands outside all brackets."""
    parts, signs, start, depth = [], [], 0, 0
    for token in re.finditer(rf"{separator.pattern}|\\begin|\\end|\\?[{{}}]|[()\[\]]|\\.", text):
        found = token.group()
        if depth == 0 and separator.fullmatch(found):
            parts.append(text[start : token.start()].strip())
            signs.append(found)
            start = token.end()
        elif found[-1] in "{([" or found == r"\begin":
            depth += 1
        elif found[-1] in "})]" or found == r"\end":
            depth -= 1
    return [*parts, text[start:].strip()], signs


def inner(text: str) -> str | None:
    """What stands in the brackets around all of the text, or None if it has none."""
    opening = 2 if text.startswith(r"\{") else 1 if text[:1] in ("(", "[") else 0
    if not opening or closing(text, 0) != len(text) - 1:
        return None
    return unbraced(text[opening : -2 if text.endswith(r"\}") else -1])


# -- the kinds, in their order -----------------------------------------------------------------------------------------


def _words(text: str) -> Answer | None:
    if re.fullmatch(r"[A-Z]{3,}", text):  # HHT, whose letters are not factors
        return Words((text.lower(),))
    said = words(text)
    if said is None:
        return None
    phrase = " ".join(said.tokens)
    if phrase in NUMBERS:
        return Value(str(NUMBERS[phrase]))
    if phrase in _PHRASES:
        return _PHRASES[phrase]
    if _NO_SOLUTION.fullmatch(phrase):
        return EMPTY_SET
    parts = listed(text) if not any(token.isdigit() for token in said.tokens) else []
    if len(parts) > 1:
        return Group("", tuple(read(rf"\text{{{part}}}") for part in parts))
    return None if len(phrase) == 1 else said  # one letter is a variable


def _clock(text: str) -> Answer | None:
    if (match := _CLOCK.fullmatch(text)) and int(match[1]) <= 24:
        return Clock(tuple(int(n) for n in match.group(1, 2, 3) if n), (match[4] or "").lower())
    return None


def _based(text: str) -> Answer | None:
    text = re.sub(r"\\text\{\s*(\w+)\s*\}", r"\1", text) if "_" in text else text
    match = _BASED.fullmatch(text.replace(" ", "")) or _BASED_IN_WORDS.fullmatch(text)
    if match is None:
        return None
    base_text = "".join(group or "" for group in match.groups()[1:])
    base = int(base_text) if base_text.isdigit() else NUMBERS.get(base_text, 0)
    digits = match[1].upper()
    is_variable = not re.search(r"\d", digits) and (base <= 10 or len(digits) < 2)
    if not 2 <= base <= 36 or is_variable:
        return None
    if any(int(digit, 36) >= base for digit in digits if digit != "."):
        return Unread(text)
    return Based(digits.lstrip("0") or "0", base)


def _residue(text: str) -> Answer | None:
    match = _RESIDUE.fullmatch(text)
    if match is None:
        return None
    value = read(match[1])
    return Residue(read(value.sides[-1]) if isinstance(value, Relation) else value, match[2] or match[3])


def _membership(text: str) -> Answer | None:
    if match := _BUILDER.fullmatch(text):
        return read(match[2])
    parts, _ = split(text, _CONNECTOR)
    if len(parts) == 1 and (match := _MEMBER.fullmatch(text)):
        return read(match[1])
    if (match := _ANY_INTEGER.search(text)) and match.start():
        variable = rf"(?<![A-Za-z\\]){match[1]}(?![A-Za-z])"
        return read(re.sub(variable, r"\\mathit{n}", text[: match.start()]))
    return None


def _several(text: str) -> Answer | None:
    if cases := re.fullmatch(r"(?:\\\{)?\s*\\begin\{(cases|aligned|array|gathered)\}(?:\{\w*\})?(.*)\\end\{\1\}", text):
        text = cases[2].replace("&", "").strip().removesuffix("\\\\")
    elif r"\begin" in text and inner(text) is None and not split(text, _CONNECTOR)[1]:
        return None
    parts, signs = split(text, _CONNECTOR)
    if len(parts) == 1 or _compound(text):
        return None
    items = [part for part in parts if part]
    if len(items) == 1:
        return read(items[0])
    word = "or" if any(sign in (r"\text{or}", r"\lor", r"\vee") for sign in signs) else ","
    return Group("", tuple(_flat(_same_name([read(item) for item in items]))), word)


def _same_name(items: list[Answer]) -> list[Answer]:
    """`x=1, x=2` and `x=1, 2` as 1, 2: one name for all of them says nothing."""
    names = {item.sides[0] for item in items if isinstance(item, Relation) and item.is_equation}
    if len(names) != 1 or not isinstance(items[0], Relation):
        return items
    return [read(item.sides[-1]) if isinstance(item, Relation) and item.is_equation else item for item in items]


def _flat(items: list[Answer]) -> Iterator[Answer]:
    for item in items:
        yield from item.items if isinstance(item, Group) and not item.brackets else (item,)


def _sets(text: str) -> Answer | None:
    if match := re.fullmatch(r"\\mathbb\{([RZNQC])\}", text):
        return NamedSet(match[1])
    if text == r"\emptyset":
        return EMPTY_SET
    if match := _EXCEPT.fullmatch(text):
        excluded = read(match[1])
        return Operation(r"\setminus", NamedSet("R"), Group("{}", tuple(_flat([excluded]))))
    parts, signs = split(text, _SET_SIGN)
    if len(parts) == 1:
        return None
    answer = read(parts[0])
    for sign, part in zip(signs, parts[1:], strict=True):
        answer = Operation(sign, answer, read(part))
    return answer


def _relation(text: str) -> Answer | None:
    if match := _POINT.fullmatch(text):
        return read(match[1])
    sides, signs = split(text, _SIGN)
    if len(sides) == 1:
        return None
    if signs[0] in (r"\approx", "=") and len(sides) == 2 and not sides[0] and sides[1]:
        return read(sides[1])
    signs = ["=" if sign == r"\equiv" else r"\approx" if sign == r"\simeq" else sign for sign in signs]
    if not all(sides):
        return Unread(text)
    return Relation(tuple(sides), tuple(signs))


def _bracketed(text: str) -> Answer | None:
    content = inner(text)
    if content is None:
        return None
    brackets = text[1 if text[0] == "\\" else 0] + text[-1]
    parts, _ = split(content, _CONNECTOR)
    if len(parts) > 1 and brackets == "()" and r"\pm" in content:
        return None  # several points
    if len(parts) == 1 and brackets != "{}":
        return read(content) if brackets in ("()", "[]") else Unread(text)
    items = tuple(_flat([read(part) for part in parts if part]))
    return Group("()" if brackets == "[]" and len(items) > 2 else brackets, items)


def _plus_minus(text: str) -> Answer | None:
    kinds = re.findall(r"\\(pm|mp)(?![A-Za-z])", text)
    if not kinds or len(kinds) > 3:
        return None
    if "mp" in kinds:  # the signs of \pm and \mp go together
        choices = [["+" if kind == upper else "-" for kind in kinds] for upper in ("pm", "mp")]
    else:
        choices = [list(signs) for signs in itertools.product("+-", repeat=len(kinds))]
    pieces = re.split(r"\\(?:pm|mp)(?![A-Za-z])", text)
    signed = ("".join(map("".join, zip(pieces, [*signs, ""], strict=True))) for signs in choices)
    return Group("", tuple(read(alternative.removeprefix("+")) for alternative in signed))


def _ratio(text: str) -> Answer | None:
    parts, _ = split(text, re.compile(":"))
    return Ratio(tuple(read(part) for part in parts)) if len(parts) > 1 and all(parts) else None


def _value(text: str) -> Answer | None:
    if compound := _compound(text):
        return Value("", None, compound)
    if r"^\circ" in text and not _TRIGONOMETRY.search(text) and not _TEMPERATURE.search(text):
        return Value(text.replace(r"^\circ", ""), DEGREE)
    if unit_start := _UNIT_START.search(text):
        number, phrase = text[: unit_start.start()].strip(), text[unit_start.start() :]
        letter = re.match(r"\\text\{\s*([A-Za-z])\s*\}", phrase)
        is_variable = (
            letter is not None and not is_unit_word(letter[1]) and (letter[1] in "iexyzn" or number[-1:].isalpha())
        )
        if number.endswith("(") and phrase.endswith(")"):
            number, phrase = number[:-1].strip(), phrase[:-1]
        if number and not is_variable and number[-1] not in "+-*/=^_(":
            unit = parse_unit(phrase)
            return Unread(text) if unit is None else Value(unbraced(number), unit)
    if (match := _BARE_UNIT.fullmatch(text)) and all(is_unit_word(w) for w in re.findall("[A-Za-z]+", match[2])):
        return Value(match[1], parse_unit(match[2]))
    return Value(text)


def _compound(text: str) -> tuple[Value, ...]:
    """`5 \text{hours} 30 \text{minutes}` as its parts; nothing if they do not measure the same."""
    parts, end = [], 0
    for match in _QUANTITY.finditer(text):
        unit = parse_unit(re.sub(r"\s+and\s*\}", "}", match[2]))
        if text[end : match.start()].strip(" ,") or unit is None or unit == PERCENT:
            return ()
        parts.append(Value(match[1], unit))
        end = match.end()
    measures = {part.unit.measures for part in parts if part.unit}
    factors = {part.unit.factor for part in parts if part.unit}
    return tuple(parts) if len(parts) == len(factors) > 1 and len(measures) == 1 and end == len(text) else ()


_READERS: tuple[Callable[[str], Answer | None], ...] = (
    _words, _clock, _based, _residue, _membership, _several, _sets, _relation, _bracketed, _plus_minus, _ratio, _value,
)  # fmt: skip
