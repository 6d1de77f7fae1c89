"""What stands between a model's answer and reasoning-gym's scorers: no text of a model is evaluated as Python.

Tasks whose scorer would evaluate the answer are scored here, with a grammar of ours; so are those that give full marks to
anything. Tasks that read more out of an answer than its text (numbers, JSON, counts of moves) get it only if it has the form
that such an answer has. All others compare strings, or pick known words and letters out of them. `scripts/faults/README.md`
lists every one; `tests/unit/test_hostile_answers.py` fails if another version of reasoning-gym evaluates in other places.

A numeral is ASCII: `int` and `float` also read other scripts' digits and underscores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import sympy

from megatron_reheat.rewards.expressions import NotInGrammar, algebra, arithmetic

MAX_ANSWER_CHARS = 100_000

Entry = Mapping[str, Any]


# -- what answers look like ---------------------------------------------------------------------------------------------

_FRACTION = r"(?:\.\d{0,1000})?|\.\d{1,1000})(?:e[-+]?\d{1,4})?"
_NUMERAL = rf"[-+]?(?:\d{{1,1000}}{_FRACTION}"
_GROUPED = rf"[-+]?(?:\d[\d,]{{0,1000}}{_FRACTION}"  # 1,000,000
_WHOLE = r"[-+]?\d{1,1000}"
_NUMERAL_ALONE = re.compile(_NUMERAL, re.ASCII | re.IGNORECASE)
_CONNECTIVES = "¬∧\N{LOGICAL OR}→↔"


def _matches(pattern: str) -> Callable[[str, Entry], bool]:
    compiled = re.compile(pattern, re.ASCII | re.IGNORECASE)
    return lambda answer, entry: compiled.fullmatch(answer) is not None


def _json(text: str) -> Any:
    """What the text stands for; None if it is no JSON, which has no NaN and no Infinity."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_json(kind: type) -> Callable[[str, Entry], bool]:
    return lambda answer, entry: isinstance(_json(answer), kind)


def _no_or_json_list(answer: str, entry: Entry) -> bool:
    return answer.lower() == "no" or isinstance(_json(answer), list)


_is_numeral = _matches(_GROUPED)
_are_numerals = _matches(rf"{_NUMERAL}(?:\s*,\s*{_NUMERAL})*")


def _floats(text: str) -> list[float] | None:
    """The numbers of a list in JSON or, with its quotation marks, of strings in Python; None if it is no such list."""
    given = _json(text.replace("'", '"'))
    if not isinstance(given, list) or not all(type(item) in (int, float, str) for item in given):
        return None
    numerals = [str(item) for item in given]
    return [float(item) for item in numerals] if all(_NUMERAL_ALONE.fullmatch(item) for item in numerals) else None


# -- tasks that are not left to reasoning-gym --------------------------------------------------------------------------


def _makes(target: int, answer: str, numbers: list[int]) -> bool:
    """Whether the expression uses exactly these numbers and has this value."""
    try:
        given = arithmetic(answer)
    except NotInGrammar:
        return False
    return given.value == target and sorted(given.numbers) == sorted(numbers)


def _countdown(answer: str, entry: Entry) -> bool:
    return _makes(entry["metadata"]["target"], answer, entry["metadata"]["numbers"])


def _puzzle24(answer: str, entry: Entry) -> bool:
    return _makes(24, answer, entry["metadata"]["numbers"])


def _integration(answer: str, entry: Entry) -> bool:
    x = sympy.Symbol(entry["metadata"]["variable"])
    integrand = algebra(entry["metadata"]["integrand"])
    try:
        derivative = sympy.diff(algebra(answer), x)
    except NotInGrammar:
        return False
    return bool(sympy.simplify(derivative - integrand) == 0)


def _polynomial_multiplication(answer: str, entry: Entry) -> bool:
    try:
        product = algebra(answer, functions=False)
    except NotInGrammar:
        return False
    return bool(product == algebra(entry["answer"], functions=False))


def _equals_answer(answer: str, entry: Entry) -> bool:
    return answer == entry["answer"].strip()


def _is_valid_board(answer: str, entry: Entry) -> bool:
    return answer in entry["metadata"]["valid_answers"]


def _same_json(answer: str, entry: Entry) -> bool:
    given = _json(answer)
    return given is not None and json.dumps(given) == json.dumps(json.loads(entry["answer"]))


def _number_sorting(answer: str, entry: Entry) -> bool:
    """Sorted as asked, and each number within 1 of the reference's, as reasoning-gym has it."""
    given, wanted = _floats(answer), _floats(entry["answer"])
    if given is None or wanted is None or len(given) != len(wanted):
        return False
    in_order = sorted(given, reverse=entry["metadata"]["direction"] != "ascending")
    return given == in_order and all(abs(a - b) <= 1 for a, b in zip(given, wanted, strict=True))


OWN_SCORERS: dict[str, Callable[[str, Entry], bool]] = {
    "countdown": _countdown,
    "puzzle24": _puzzle24,
    "simple_integration": _integration,
    "intermediate_integration": _integration,
    "polynomial_multiplication": _polynomial_multiplication,
    "binary_matrix": _equals_answer,
    "spiral_matrix": _equals_answer,
    "string_insertion": _equals_answer,
    "game_of_life_halting": _equals_answer,
    "n_queens": _is_valid_board,
    "game_of_life": _same_json,
    "number_sorting": _number_sorting,
}


# -- what reasoning-gym's scorers may be given -------------------------------------------------------------------------


def _solutions(answer: str, entry: Entry) -> bool:
    return answer in ('""', "''") if not entry["answer"] else _are_numerals(answer, entry)


def _plain(answer: str, entry: Entry) -> bool:
    return answer.isascii() and "_" not in answer


def _plain_moves(answer: str, entry: Entry) -> bool:
    return _plain(answer, entry) and re.search(r"\d{3}", answer) is None


GUARDS: dict[str, Callable[[str, Entry], bool]] = {
    **dict.fromkeys(("chain_sum", "products", "number_format"), _is_numeral),
    **dict.fromkeys(("decimal_arithmetic", "decimal_chain_sum", "power_function"), _is_numeral),
    "rectangle_count": _matches(_WHOLE),
    "coin_flip": _matches(rf"{_GROUPED}|{_WHOLE}\s*/\s*\d{{1,1000}}"),
    "bitwise_arithmetic": _matches(r"[-+]?(?:0x[0-9a-f]{1,1000}|0b[01]{1,4000}|0o[0-7]{1,2000}|\d{1,1000})"),
    "complex_arithmetic": _matches(r"[-+\d.eij()\s]+"),
    "polynomial_equations": _solutions,
    "advanced_geometry": lambda answer, entry: re.fullmatch(r"[-+0-9.eE,()°\s]+", answer) is not None,
    "calendar_arithmetic": _matches(rf"[a-z]+|{_WHOLE}"),
    "cryptarithm": _matches(r"[a-z]\s*=\s*\d(?:\s*,\s*[a-z]\s*=\s*\d)*"),
    "fraction_simplification": _matches(
        rf"\$*\s*(?:\\d?frac\s*\{{\s*\d+\s*\}}\s*\{{\s*\d+\s*\}}|{_WHOLE}\s*/\s*{_WHOLE})\s*\$*"
    ),
    "pool_matrix": _matches(r"[-+\d.e\s]+"),
    "prime_factorization": _matches("\\d{1,1000}(?:\\s*\N{MULTIPLICATION SIGN}\\s*\\d{1,1000})*"),
    "time_intervals": _matches(r"[a-z\d:.,+\s-]+"),
    **dict.fromkeys(("survo", "tower_of_hanoi"), _plain),
    **dict.fromkeys(("rubiks_cube", "rush_hour"), _plain_moves),
    "propositional_logic": lambda answer, entry: re.fullmatch(rf"[A-Z()\s{_CONNECTIVES}]{{1,500}}", answer) is not None,
    "graph_color": _is_json(dict),
    **dict.fromkeys(("boxnet", "group_anagrams", "jugs", "palindrome_partitioning"), _is_json(list)),
    "knight_swap": _no_or_json_list,
}
