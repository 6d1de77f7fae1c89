"""Whether a run's references can be earned at all: each is graded against itself before the first response is."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_reheat.rewards.boxes import reference_answer
from megatron_reheat.rewards.pool import VerifierPool

BATCH = 512
EXAMPLES = 3
EXAMPLE_CHARS = 60
# far above what real data takes; a start does not wait longer for millions of records or references that keep a parser busy
BUDGET_S = 60.0


@dataclass(frozen=True)
class ReferenceCheck:
    """How many distinct references were graded, which of them fail, and whether there was no time for more."""

    count: int
    failed: tuple[str, ...]
    cut_short: bool = False

    def __str__(self) -> str:
        text = f"references: {len(self.failed):,} of {self.count:,} are not right when graded against themselves"
        if self.failed:
            text += ", so that no response can earn them: " + "; ".join(map(_shown, self.failed[:EXAMPLES]))
        return text + (f" (the others were left out after {BUDGET_S:.0f} s)" if self.cut_short else "")


def check_references(pool: VerifierPool, verifiers: Iterable[Mapping[str, Any]]) -> ReferenceCheck:
    """Grades every distinct reference against itself.

    Entries of reasoning-gym without an answer of their own are left out: their tasks accept many. So are integrals that sympy
    left unsolved: their task accepts the solution, not the question.
    """
    give_up = time.monotonic() + BUDGET_S
    failed: list[str] = []
    count = 0
    distinct = _distinct(itertools.takewhile(lambda _: time.monotonic() < give_up, verifiers))
    while batch := list(itertools.islice(distinct, BATCH)):
        graded = pool.grade([(response, verifier) for _, response, verifier in batch])
        failed += [reference for (reference, _, _), reward in zip(batch, graded, strict=True) if not reward.correct]
        count += len(batch)
    return ReferenceCheck(count, tuple(failed), cut_short=time.monotonic() >= give_up)


def _distinct(verifiers: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Each reference with the response that gives it and its verifier."""
    seen: set[str] = set()
    for verifier in verifiers:
        if "entry" in verifier:
            reference = verifier["entry"].get("answer")
            response = f"<answer>{reference}</answer>"
        else:
            reference = verifier["answer"]
            response = f"\\boxed{{{reference_answer(reference)}}}"
        if reference is None or ("answer" in verifier and reference in seen):
            continue
        if verifier.get("task") == "intermediate_integration" and "Integral(" in reference:
            continue
        if "answer" in verifier:
            seen.add(reference)
        yield str(reference), response, verifier


def _shown(reference: str) -> str:
    text = " ".join(reference.split())
    return repr(text if len(text) <= EXAMPLE_CHARS else text[: EXAMPLE_CHARS - 3] + "...")
