"""Final answers in LaTeX, compared as mathematics by math-verify."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

# math-verify warns whenever its own timeouts are off; here the pool kills the whole process instead.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def verify_math(response: str, verifier: Mapping[str, Any]) -> float:
    r"""1.0 if the last `\boxed{...}` of the response equals `verifier["answer"]`, else 0.0.

    A response without a complete box is wrong: a truncated derivation may end in the right number by accident.
    The reference may be plain, in `$...$`, boxed, or end in `#### answer`. May run forever on hostile input:
    call it through `VerifierPool`.
    """
    answer = last_boxed(response)
    if not answer:
        return 0.0
    return float(verify(_parse_reference(str(verifier["answer"])), _parse(answer), timeout_seconds=None))


def last_boxed(text: str) -> str | None:
    r"""What stands inside the last `\boxed{...}`, or None if there is none or its braces do not close."""
    starts = [match.end() for match in _BOX.finditer(text)]
    if not starts:
        return None
    depth = 1
    for brace in _BRACE.finditer(text, starts[-1]):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[starts[-1] : brace.start()].strip()
    return None


@lru_cache(maxsize=1024)  # one reference serves a whole group
def _parse_reference(reference: str) -> list[Any]:
    answer = last_boxed(reference) or reference.rpartition("####")[2]
    return _parse(answer.strip().strip("$"))


def _parse(answer: str) -> list[Any]:
    return parse(f"\\boxed{{{answer}}}", extraction_mode="first_match", parsing_timeout=None)
