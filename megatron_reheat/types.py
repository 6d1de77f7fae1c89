"""Records that travel round the loop: prompts -> completions -> rewards -> groups -> train batch.

Shape legend used across the package: P prompts, G completions per prompt, T packed tokens, V vocabulary.
Token arrays are int32 and log-probability arrays float32, so that a group crosses process borders as compact numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

TokenArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]

FinishReason = Literal["stop", "length"]
StageName = Literal["sft", "rlvr", "reheat"]


@dataclass(frozen=True)
class Prompt:
    """One problem, ready to be sampled from.

    `index` is the position in the dataset and stays the same across epochs and restarts;
    `verifier` holds whatever the grader needs (a reference answer, a reasoning-gym entry) and is never shown to the policy.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    verifier: Mapping[str, Any]
    solution: str | None = None


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. `temperature=0` is greedy; `top_p < 1` is for evaluation only (it renormalises the log-probabilities)."""

    temperature: float
    max_tokens: int
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Completion:
    """One sampled response with its provenance.

    `rollout_logprobs[i]` is the log-probability of `token_ids[i]` under the policy that sampled it, at `sampling_temperature`.
    """

    token_ids: TokenArray
    rollout_logprobs: FloatArray
    sampling_temperature: float
    policy_version: int
    finish_reason: FinishReason


@dataclass(frozen=True)
class Reward:
    """A grade: `value` is what RL maximises, `correct` is what avg@k and dynamic sampling count."""

    value: float
    correct: bool
    timed_out: bool = False


@dataclass(frozen=True)
class Group:
    """One prompt, its completions and, once graded, one reward each."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: tuple[Reward, ...] = ()

    @property
    def accuracy(self) -> float:
        return sum(r.correct for r in self.rewards) / len(self.rewards)


@dataclass(frozen=True)
class TrainSequence:
    """Prompt and response as one sequence of L tokens, R of them in the response.

    `rollout_logprobs` and `old_logprobs` are [R]; `old_logprobs` is None until the trainer has scored the batch.
    """

    token_ids: TokenArray
    num_prompt_tokens: int
    advantage: float = 0.0
    rollout_logprobs: FloatArray | None = None
    old_logprobs: FloatArray | None = None

    @property
    def num_response_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(frozen=True)
class TrainBatch:
    """The sequences of one optimizer step, the same on every rank; the engine splits them over data parallelism.

    `num_valid_tokens` is the GLOBAL count of response tokens: the denominator of a token-mean loss, fixed before
    the first micro-batch so that the loss does not depend on how the batch is cut.
    """

    sequences: tuple[TrainSequence, ...]

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def num_valid_tokens(self) -> int:
        return sum(s.num_response_tokens for s in self.sequences)

    @property
    def num_tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.sequences)

    def with_old_logprobs(self, old_logprobs: Sequence[FloatArray]) -> TrainBatch:
        return TrainBatch(
            tuple(replace(s, old_logprobs=lp) for s, lp in zip(self.sequences, old_logprobs, strict=True))
        )

    def minibatches(self, size: int) -> list[TrainBatch]:
        """Consecutive minibatches of `size` sequences; the last may be smaller."""
        return [TrainBatch(self.sequences[i : i + size]) for i in range(0, len(self.sequences), size)]
