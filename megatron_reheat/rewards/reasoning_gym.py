"""Procedural tasks, scored by the reasoning-gym task that made them where that evaluates nothing; see `guards`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from reasoning_gym import get_score_answer_fn

from megatron_reheat.rewards.guards import GUARDS, MAX_ANSWER_CHARS, OWN_SCORERS

_OPEN, _CLOSE = "<answer>", "</answer>"
_FULL_SCORE = 1.0 - 1e-6


def verify_reasoning_gym(response: str, verifier: Mapping[str, Any]) -> float:
    """1.0 if the task gives the answer its full score, else 0.0; partial credit counts as wrong.

    The answer is the last `<answer>...</answer>` of the response, or the whole response without surrounding space.
    `verifier` is `{"task": name, "entry": the record the task generated}`. May take very long on hostile input: call it through
    `VerifierPool` only, never in the training process.
    """
    answer = _answer(response)
    if not answer or len(answer) > MAX_ANSWER_CHARS:
        return 0.0
    task, entry = verifier["task"], verifier["entry"]
    if task == "composite":
        task = entry["metadata"]["source_dataset"]
    if own_scorer := OWN_SCORERS.get(task):
        return float(own_scorer(answer, entry))
    if (may_see := GUARDS.get(task)) and not may_see(answer, entry):
        return 0.0
    return float(_scorer(task)(answer, _as_made(task, entry)) >= _FULL_SCORE)


def _answer(response: str) -> str:
    """What stands in the last pair of tags, each taken with the next one that closes it; linear in the response."""
    last, end = response, 0
    while (start := response.find(_OPEN, end)) >= 0 and (close := response.find(_CLOSE, start)) >= 0:
        last, end = response[start + len(_OPEN) : close], close + len(_CLOSE)
    return last.strip()


def _as_made(task: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a JSON or Arrow copy as the task made it, where its scorer can tell the two apart."""
    metadata = dict(entry["metadata"])
    if task in ("arc_agi", "rearc"):  # JSON and Arrow have no tuples
        metadata["output"] = tuple(map(tuple, metadata["output"]))
    if task == "boxnet":  # Arrow gives every grid the squares of all others, as nulls
        grid = metadata["initial_state"].items()
        metadata["initial_state"] = {square: items for square, items in grid if items is not None}
    return {**entry, "metadata": metadata}


@lru_cache(maxsize=64)
def _scorer(task: str) -> Callable[[str, Mapping[str, Any]], float]:
    return get_score_answer_fn(task)
