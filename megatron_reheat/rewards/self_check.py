"""Whether a run's references can be earned at all: each is graded against itself before the first response is."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_reheat.errors import ConfigError
from megatron_reheat.rewards.boxes import reference_answer
from megatron_reheat.rewards.pool import VerifierPool

BATCH = 512
TRIED = 8
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


def try_functions(pool: VerifierPool, verifiers: Iterable[Mapping[str, Any]]) -> None:
    """Has the reward functions grade an empty response to each of the first records, as a policy may give.

    Raises:
        ConfigError: naming the function and record: one raised, returned no number, or did not come back.
    """
    for verifier in itertools.islice(verifiers, TRIED):
        errors = pool.errors
        (reward,) = pool.grade([("", verifier)])
        if pool.errors > errors:
            problem = pool.last_error
        elif reward.timed_out:
            problem = f"{verifier['where']}: no answer within reward.timeout_s, or its process ended"
        else:
            continue
        raise ConfigError(
            f"reward.function failed on an empty response to {problem}; it must return a number for any text (what it may "
            "use: reward.sandbox)"
        )


def _distinct(verifiers: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Each reference with the response that gives it and its verifier; one that the same question had before is left out."""
    seen: set[int] = set()  # the texts themselves would take as much memory as the data
    for verifier in verifiers:
        if "entry" in verifier:
            reference = verifier["entry"].get("answer")
            response, asked = f"<answer>{reference}</answer>", _without_place(verifier["entry"])
        else:
            reference = asked = verifier["answer"]
            response = f"\\boxed{{{reference_answer(reference)}}}"
        if reference is None or (key := hash(repr(asked))) in seen:
            continue
        if verifier.get("task") == "intermediate_integration" and "Integral(" in reference:
            continue
        seen.add(key)
        yield str(reference), response, verifier


def _without_place(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A reasoning-gym entry without its number among all that its task made, which no scorer reads."""
    metadata = entry.get("metadata")
    if not isinstance(metadata, Mapping):
        return dict(entry)
    return {**entry, "metadata": {name: value for name, value in metadata.items() if name != "source_index"}}


def _shown(reference: str) -> str:
    text = " ".join(reference.split())
    return repr(text if len(text) <= EXAMPLE_CHARS else text[: EXAMPLE_CHARS - 3] + "...")
