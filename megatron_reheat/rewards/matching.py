r"""Whether two answers are equal the way a mathematician reads them.

The reference says what form is asked for: a point keeps its order, a list and a set do not; a name (`x=5`), a unit or
a base may be missing on one side, but not differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from megatron_reheat.rewards.answers import Answer, Based, Clock, Group, Ratio, Relation, Residue, Value, read
from megatron_reheat.rewards.equations import (
    has_name,
    names_differ,
    same_curve,
    stated_values,
    states_value,
    with_argument_of,
)
from megatron_reheat.rewards.latex import clean, has_leading_zero, join_comma_groups
from megatron_reheat.rewards.prose import Words
from megatron_reheat.rewards.quantities import congruent, proportional, same_quantity, same_vector
from megatron_reheat.rewards.real_sets import is_set, same_set
from megatron_reheat.rewards.values import Unreadable

# no answer is that long: a response that never stops is not worth a parser's time
MAX_EXTRA_CHARS = 2000

_INTEGER = re.compile(r"[-+]?\d{1,4000}")
_ANNOUNCED_CHOICE = re.compile(
    r"^\\text\{\s*(?:the\s+)?(?:correct\s+)?(?:answer|option|choice)(?:\s+is)?(?:\s+([A-J]))?\s*\}\s*:?\s*",
    re.IGNORECASE,
)
_CHOICE = re.compile(r"\(\s*([A-Ja-j])\s*\)\s*(.*)|([A-J])\s*[).:]\s*(.*)|([a-j])\)\s*(.*)|([A-J])", re.DOTALL)
_EXPLAINED_CHOICE = re.compile(
    r"([A-J])\s*[-,(]*\s*(\\text\{(?!and\b|or\b|not\b|is\b)[^{}]*[a-z]{3}[^{}]*\}.*)", re.DOTALL
)
_NO_CHOICE = re.compile(r"\\text\{(?:and|or)\b|[-+](?!\s*\d)|[*/=^_<>,;&|(]|\\(?:cup|cap|cdot|times|le|ge)(?![A-Za-z])")


def is_right(answer: str, reference: str) -> bool:
    """The verdict on what stands in the box; `reference` is an answer too, without its box."""
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(reference):
        return int(answer) == int(reference)
    if len(answer) > MAX_EXTRA_CHARS + len(reference):
        return False
    wanted, given = clean(reference), clean(answer)
    if not wanted or not given:
        return False
    if (verdict := _same_choice(wanted, given)) is not None:
        return verdict
    wanted_read, given_read = _read(wanted), _read(given)
    # `100,200,300` is a list where the other side is one, else a number
    if isinstance(wanted_read, Group) and isinstance(given_read, Value) and not has_leading_zero(given):
        given_read = read(given)
    elif isinstance(given_read, Group) and isinstance(wanted_read, Value) and not has_leading_zero(wanted):
        wanted_read = read(wanted)
    return _compact(wanted) == _compact(given) or equal(wanted_read, given_read)


def _compact(text: str) -> str:
    return re.sub(r"\s+(?=\W)|(?<=\W)\s+", "", text)


def _read(text: str) -> Answer:
    return read(join_comma_groups(text))


# -- lettered choices --------------------------------------------------------------------------------------------------


def _same_choice(wanted: str, given: str) -> bool | None:
    """The verdict if the reference is a lettered choice and the answer may be one; None if it is no matter of letters."""
    choice, chosen = _choice(wanted), _choice(given)
    if choice is None:
        return None
    letter, meaning = choice
    if chosen is None:
        return is_right(given, meaning) if meaning else None
    return chosen[0] == letter and (not meaning or not chosen[1] or is_right(chosen[1], meaning))


def _choice(text: str) -> tuple[str, str] | None:
    """The letter of a lettered choice and the text behind it; None if the answer does not begin as one."""
    text = _ANNOUNCED_CHOICE.sub(lambda said: f"{said[1]}: " if said[1] else "", text)
    text = re.sub(r"\\text\{\s*([A-Za-z])\s*\}", r"\1", text).strip(" :")
    match = _CHOICE.fullmatch(text) or _EXPLAINED_CHOICE.fullmatch(text)
    if match is None:
        return None
    letter, meaning = [*(group for group in match.groups() if group is not None), ""][:2]
    return None if _NO_CHOICE.match(meaning) else (letter.upper(), meaning.strip())


# -- the kinds against each other --------------------------------------------------------------------------------------


def equal(wanted: Answer, given: Answer) -> bool:
    """Whether two answers say the same; the first is the reference."""
    wanted, given = _alone(wanted), _alone(given)
    try:
        return wanted == given or _equal(wanted, given)
    except Unreadable:
        return False


def _equal(wanted: Answer, given: Answer) -> bool:
    if is_set(wanted) or is_set(given):
        return same_set(wanted, given)
    match wanted, given:
        case Relation(), Relation():
            return _same_equation(wanted, given)
        case _, Relation():
            return any(equal(wanted, value) for value in stated_values(given))
        case Relation(), _:
            return states_value(wanted) and equal(read(wanted.sides[-1]), given)
        case Value(), Value():
            return same_quantity(wanted, given)
        case Group(), Group():
            return _same_group(wanted, given)
        case Group(brackets="()"), Value():
            return same_vector(given, wanted)
        case Value(), Group(brackets="()"):
            return same_vector(wanted, given)
        case Residue(), Residue():
            return congruent(wanted, given)
        case Residue(), _:
            return equal(wanted.value, given)
        case _, Residue():
            return equal(wanted, given.value)
        case Clock(), Clock():
            return wanted.numbers == given.numbers and (not wanted.half or not given.half or wanted.half == given.half)
        case (Words() as said, Value() as value) | (Value() as value, Words() as said):
            return "".join(said.tokens) == value.text.lower()  # HT typed as letters
        case (Clock() as clock, Value() as value) | (Value() as value, Clock() as clock):
            hours, minutes, *_ = clock.numbers
            return not clock.half and value.text in (f"{hours}/{minutes}", rf"\frac{{{hours}}}{{{minutes}}}")
        case Ratio(), Ratio():
            return proportional(wanted.parts, given.parts)
        case (Ratio(), Value()) | (Value(), Ratio()):
            one = Value("1")
            return proportional(*(side.parts if isinstance(side, Ratio) else (side, one) for side in (wanted, given)))
        case (Based() as based, Value() as value) | (Value() as value, Based() as based):
            return value.unit is None and value.text.lstrip("0").upper() == based.digits
    return False


def _alone(answer: Answer) -> Answer:
    """A set or list of one is what it holds, but the set that holds a set is not."""
    while isinstance(answer, Group) and len(answer.items) == 1:
        (item,) = answer.items
        if isinstance(item, Group) and item.brackets == "{}":
            break
        answer = item
    return answer


def _same_equation(wanted: Relation, given: Relation) -> bool:
    if has_name(wanted) and has_name(given):
        value = read(wanted.sides[-1])
        if equal(value, read(given.sides[-1])):
            return not names_differ(wanted, given)
        if (renamed := with_argument_of(wanted, given)) is not None:
            return equal(value, read(renamed))
    return same_curve(wanted, given)


# -- several answers -----------------------------------------------------------------------------------------------------


def _same_group(wanted: Group, given: Group) -> bool:
    kinds = {wanted.brackets, given.brackets}
    names, other_names = _named(wanted), _named(given)
    if names and other_names:
        return names.keys() == other_names.keys() and all(equal(names[name], other_names[name]) for name in names)
    if names:
        return _same_as_named(names, given, lambda group: _same_group(group, given))
    if other_names:
        return _same_as_named(other_names, wanted, lambda group: _same_group(wanted, group))
    if kinds <= {"", "{}"}:
        sides = [wanted.items, given.items]
        if "{}" in kinds:
            sides = [_distinct(items) for items in sides]
        return _same_items(*sides)
    if len(kinds) == 1 or kinds == {"", "()"}:
        return len(wanted.items) == len(given.items) and all(map(equal, wanted.items, given.items))
    return False


def _named(group: Group) -> dict[str, Answer] | None:
    """`x=1, y=2` by its names; None for other lists."""
    if not group.items or not all(isinstance(item, Relation) and has_name(item) for item in group.items):
        return None
    return {item.sides[0].strip(): read(item.sides[-1]) for item in group.items if isinstance(item, Relation)}


def _same_as_named(names: dict[str, Answer], other: Group, matches: Callable[[Group], bool]) -> bool:
    """`x=1, y=2` for (1, 2), in the order of the alphabet; `x_1=1, x_2=2` for any order of 1, 2."""
    if other.brackets == "{}" and len({re.sub(r"_\{.*", "", name) for name in names}) > 1:
        return False
    brackets = other.brackets if other.brackets == "{}" else "()"
    return matches(Group(brackets, tuple(names[name] for name in sorted(names))))


def _same_items(wanted: Sequence[Answer], given: Sequence[Answer]) -> bool:
    """Whether each of one side has a partner of its own on the other."""
    left = list(given)
    for item in wanted:
        partner = next((i for i, other in enumerate(left) if equal(item, other)), None)
        if partner is None:
            return False
        del left[partner]
    return not left


def _distinct(items: Sequence[Answer]) -> tuple[Answer, ...]:
    kept: list[Answer] = []
    for item in items:
        if not any(equal(item, other) for other in kept):
            kept.append(item)
    return tuple(kept)
