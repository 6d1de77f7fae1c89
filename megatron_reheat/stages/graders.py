"""Grades what one rank samples, while it samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_reheat.rewards.pool import Grading, VerifierPool
from megatron_reheat.rewards.worker_process import Task
from megatron_reheat.types import Completion, Prompt, Reward


class Graders:
    """Grades completions of these prompts: those that are handed over meanwhile at once, the others when all are there."""

    def __init__(
        self, verifiers: VerifierPool, prompts: Sequence[Prompt], decode: Callable[[Sequence[int]], str]
    ) -> None:
        self._grading: Grading = verifiers.begin()
        self._prompts = prompts
        self._decode = decode
        self._tasks: dict[tuple[int, int], Task] = {}

    def forget(self) -> None:
        """An engine samples again from the start. Texts that come again are found graded: the grading knows them."""
        self._tasks.clear()

    def take(self, prompt: int, sample: int, completion: Completion) -> None:
        """Begins to grade a completion, by its position."""
        text = self._decode(completion.token_ids.tolist())
        (self._tasks[prompt, sample],) = self._grading.add([(text, self._prompts[prompt].verifier)])

    def rewards(self, completions: Sequence[Sequence[Completion]]) -> list[list[Reward]]:
        """Of everything that was sampled, in order, once nothing samples any more."""
        self._grading.settle()
        places = [(p, i) for p, of_one in enumerate(completions) for i in range(len(of_one))]
        missing = [(p, i) for p, i in places if (p, i) not in self._tasks]
        items = [(self._decode(completions[p][i].token_ids.tolist()), self._prompts[p].verifier) for p, i in missing]
        self._tasks |= zip(missing, self._grading.add(items), strict=True)
        flat = iter(self._grading.rewards([self._tasks[place] for place in places]))
        return [[next(flat) for _ in of_one] for of_one in completions]
