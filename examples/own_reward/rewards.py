"""Rewards of one's own for the countdown task: `reward.function` names these functions.

Each gets the text of a response and the prompt's record as the data has it. It returns a number, or a number and whether the
response counts as correct (for avg@k, pass@k and the methods that tell right from wrong).
"""

from __future__ import annotations

import re
from typing import Any

# numbers, brackets and + - * /, but no ** or //: nothing else is evaluated
EXPRESSION = re.compile(r"(?!.*(?:\*\*|//|\d{7}))[-+*/() \d]{1,64}")


def closeness(response: str, record: dict[str, Any]) -> tuple[float, bool]:
    """1 for an expression that uses the numbers and gives the target, less the further it is off."""
    expression, metadata = response.strip(), record["metadata"]
    if not EXPRESSION.fullmatch(expression):
        return 0.0, False
    if sorted(map(int, re.findall(r"\d+", expression))) != sorted(metadata["numbers"]):
        return 0.0, False
    try:
        value = eval(expression)
    except (ArithmeticError, SyntaxError, TypeError):  # 007 is no number in Python, and 3(8) calls one
        return 0.0, False
    if not isinstance(value, int | float):  # ()
        return 0.0, False
    off = abs(value - metadata["target"]) / max(1, abs(metadata["target"]))
    return 1.0 / (1.0 + off), off == 0


def brevity(response: str, record: dict[str, Any]) -> float:
    """1 for nothing, 0 from 64 characters on."""
    return max(0.0, 1.0 - len(response) / 64)
