"""Procedural tasks, scored by the reasoning-gym task that made them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from reasoning_gym import get_score_answer_fn

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_FULL_SCORE = 1.0 - 1e-6


def verify_reasoning_gym(response: str, verifier: Mapping[str, Any]) -> float:
    """1.0 if the task gives the answer its full score, else 0.0; partial credit counts as wrong.

    The answer is the last `<answer>...</answer>` of the response, or the whole response without surrounding space.
    `verifier` is `{"task": name, "entry": the record the task generated}`. Some tasks evaluate the answer with sympy:
    call this through `VerifierPool` only, never in the training process.
    """
    tagged = _ANSWER.findall(response)
    answer = (tagged[-1] if tagged else response).strip()
    if not answer:
        return 0.0
    return float(_scorer(verifier["task"])(answer, verifier["entry"]) >= _FULL_SCORE)


@lru_cache(maxsize=64)
def _scorer(task: str) -> Callable[[str, Mapping[str, Any]], float]:
    return get_score_answer_fn(task)
