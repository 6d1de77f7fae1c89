"""The table of graded pairs: every verdict is the one a mathematician gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_reheat.rewards.math import verify_math

TABLE: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "graded_answers.yaml").read_text(encoding="utf-8"))
DOUBTFUL = TABLE.pop("doubtful")


def wrong_verdicts(pairs: list[list[str]], expected: str) -> list[str]:
    graded = [
        (answer, reference, verify_math(f"\\boxed{{{answer}}}", {"answer": reference})) for answer, reference in pairs
    ]
    return [f"{answer} against {reference}" for answer, reference, grade in graded if grade != (expected == "right")]


@pytest.mark.parametrize("kind", TABLE)
def test_every_kind_of_answer(kind: str) -> None:
    for expected, pairs in TABLE[kind].items():
        assert wrong_verdicts(pairs, expected) == [], f"these should be {expected}"


def test_doubtful_pairs_get_the_verdict_that_is_written_beside_them() -> None:
    assert all(reason for *_, reason in DOUBTFUL)
    for answer, reference, expected, _ in DOUBTFUL:
        assert wrong_verdicts([[answer, reference]], expected) == [], f"should be {expected}"


def test_no_pair_stands_in_the_table_twice() -> None:
    pairs = [tuple(pair) for kinds in TABLE.values() for listed in kinds.values() for pair in listed]
    pairs += [(answer, reference) for answer, reference, *_ in DOUBTFUL]
    assert len(pairs) >= 150
    assert [pair for pair in set(pairs) if pairs.count(pair) > 1] == []


@pytest.mark.parametrize(
    "answer", ["(" * 600 + "1" + ")" * 600, "1" * 100_000, "\\frac" * 3000, "$" * 5000, "\\\\" * 3000]
)
def test_answers_that_no_one_gives_are_wrong_at_once(answer: str) -> None:
    assert verify_math(f"\\boxed{{{answer}}}", {"answer": "42"}) == 0.0
