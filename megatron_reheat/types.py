"""Records that travel round the loop: prompts -> completions -> rewards -> groups -> train batch.

Shape legend used across the package: P prompts, G completions per prompt, T packed tokens, V vocabulary.
Token arrays are int32 and log-probability arrays float32, so that a group crosses process borders as compact numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

TokenArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]

POLICY = "policy"  # the sampler that is trained

FinishReason = Literal["stop", "length"]
StageName = Literal["sft", "rlvr", "reheat"]
# what a teacher is shown: a field of the record, or a correct response of the policy itself
HintSource = Literal["record", "sibling"]


@dataclass(frozen=True)
class Prompt:
    """One problem, ready to be sampled from.

    `index` is the position in the dataset and stays the same across epochs and restarts;
    `verifier` holds whatever the grader needs (a reference answer, a reasoning-gym entry) and is never shown to the policy;
    `source` is the part of `data.mix` that it is from.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    verifier: Mapping[str, Any]
    solution: str | None = None
    source: str = ""


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

    `rollout_logprobs[i]` is the log-probability of `token_ids[i]` under what sampled it, at `sampling_temperature`: the policy,
    or the frozen model that `sampler` names.
    """

    token_ids: TokenArray
    rollout_logprobs: FloatArray
    sampling_temperature: float
    policy_version: int
    finish_reason: FinishReason
    sampler: str = POLICY


@dataclass(frozen=True)
class Reward:
    """A grade: `value` is what RL maximises, `correct` is what avg@k counts; `parts` are the values of reward functions by
    name, before their weights."""

    value: float
    correct: bool
    timed_out: bool = False
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """One prompt, its completions and, once graded, one reward each."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: tuple[Reward, ...] = ()

    @property
    def accuracy(self) -> float:
        """Share of its completions that are correct, once they are graded."""
        return sum(r.correct for r in self.rewards) / len(self.rewards)

    @property
    def is_uniform(self) -> bool:
        """Whether all its rewards are the same, so that it teaches nothing."""
        return len({r.value for r in self.rewards}) == 1


@dataclass(frozen=True)
class Collected:
    """The groups to train on, and what they were chosen from.

    `first` is the whole first generation batch as the policy sampled it: that from which groups were made that are in
    `groups`, where only what an older policy sampled comes before them (`rl.max_staleness`), and the `discarded`. `metrics` are
    over everything that the policy sampled for them.
    `extra` are groups that a method sampled besides.
    """

    groups: list[Group]
    first: list[Group]
    discarded: list[Group]
    metrics: dict[str, float]
    extra: tuple[Group, ...] = ()

    @property
    def shown(self) -> list[Group]:
        """What to look at: what is trained on or, where that is nothing, what was thrown away."""
        return self.groups or self.discarded


@dataclass(frozen=True)
class At:
    """Where the run is.

    `step` counts every stage's steps from 1, `rl_step` those of RL in this run from 1, `stage_step` those since the stage
    began from 0. `entropy` is that of the step before in nats, None before the first. `seed` is for a method's own draws.
    """

    step: int
    rl_step: int
    stage_step: int
    temperature: float
    seed: int
    entropy: float | None = None


@dataclass(frozen=True)
class TrainSequence:
    """Prompt and response as one sequence of L tokens, R of them in the response.

    `rollout_logprobs` and `old_logprobs` are [R]; `old_logprobs` is None until the trainer has scored the batch.
    `advantage` is one number, or [R]. `share` is the share of each of its tokens in the batch's loss; None leaves it to the
    aggregation, which then runs over the other sequences only. `on_policy` tells whether the policy sampled it, as the step
    samples; only then is it measured (entropy, mismatch) and corrected (TIS). `extra` are further [R] columns, which the
    loss finds by the same names in the micro-batch. `privileged_token_ids` is the prompt of a teacher that knows more.
    """

    token_ids: TokenArray
    num_prompt_tokens: int
    advantage: float | FloatArray = 0.0
    rollout_logprobs: FloatArray | None = None
    old_logprobs: FloatArray | None = None
    share: float | None = None
    on_policy: bool = True
    extra: Mapping[str, FloatArray] = field(default_factory=dict)
    privileged_token_ids: TokenArray | None = None
    completion: Completion | None = None

    @classmethod
    def of(cls, prompt: Prompt, completion: Completion, temperature: float | None = None) -> TrainSequence:
        """Prompt and response as one sequence. `temperature` is that at which the step samples, None if any will do."""
        return cls(
            token_ids=np.concatenate([np.asarray(prompt.token_ids, dtype=np.int32), completion.token_ids]),
            num_prompt_tokens=len(prompt.token_ids),
            rollout_logprobs=completion.rollout_logprobs,
            on_policy=completion.sampler == POLICY and temperature in (None, completion.sampling_temperature),
            completion=completion,
        )

    @property
    def num_response_tokens(self) -> int:
        """R; 0 where a view leaves the sequence out."""
        return len(self.token_ids) - self.num_prompt_tokens

    def behind(self, prompt: TokenArray) -> TrainSequence:
        """The same response behind another prompt."""
        response = self.token_ids[self.num_prompt_tokens :]
        return replace(self, token_ids=np.concatenate([prompt, response]), num_prompt_tokens=len(prompt))

    def left_out(self) -> TrainSequence:
        """In its place, where a view does not read it: no tokens."""
        return replace(self, token_ids=self.token_ids[:0], num_prompt_tokens=0)


@dataclass(frozen=True)
class TrainBatch:
    """The sequences of one optimizer step, the same on every rank; the engine splits them over data parallelism.

    `num_valid_tokens` is the GLOBAL count of response tokens that share the loss evenly: the denominator of a token-mean
    loss, fixed before the first micro-batch so that the loss does not depend on how the batch is cut.
    """

    sequences: tuple[TrainSequence, ...]

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def num_valid_tokens(self) -> int:
        """Without sequences that have a `share` of their own."""
        return sum(s.num_response_tokens for s in self.sequences if s.share is None)

    @property
    def num_tokens(self) -> int:
        """Of prompts and responses, on all ranks together."""
        return sum(len(s.token_ids) for s in self.sequences)

    def with_old_logprobs(self, old_logprobs: Sequence[FloatArray]) -> TrainBatch:
        """With what the trainer scored, which is also what an off-policy sequence counts as sampled with: a difference that
        is intended is not corrected."""
        return TrainBatch(
            tuple(
                replace(s, old_logprobs=lp, rollout_logprobs=s.rollout_logprobs if s.on_policy else lp)
                for s, lp in zip(self.sequences, old_logprobs, strict=True)
            )
        )

    def with_extra(self, name: str, columns: Sequence[FloatArray]) -> TrainBatch:
        """With one more column, [R] per sequence."""
        return TrainBatch(
            tuple(replace(s, extra={**s.extra, name: c}) for s, c in zip(self.sequences, columns, strict=True))
        )

    def minibatches(self, size: int) -> list[TrainBatch]:
        """Consecutive minibatches of `size` sequences; the last may be smaller. Those with a share of their own are dealt out
        over them, each with as much more weight as there are minibatches."""
        even = [s for s in self.sequences if s.share is None]
        cuts = [even[i : i + size] for i in range(0, len(even), size)]
        own = [replace(s, share=s.share * len(cuts)) for s in self.sequences if s.share is not None]
        return [TrainBatch((*cut, *own[k :: len(cuts)])) for k, cut in enumerate(cuts)]


@dataclass(frozen=True)
class Scores:
    """Per sequence of a batch, [R] float32: log-probabilities at the sampling temperature, entropies at temperature 1.

    `columns` are further answers that were asked for, by name.
    """

    logprobs: list[FloatArray]
    entropies: list[FloatArray]
    columns: Mapping[str, list[FloatArray]] = field(default_factory=dict)

    @property
    def mean_entropy(self) -> float:
        """Token mean over the batch, in nats."""
        count = sum(len(e) for e in self.entropies)
        return float(sum(e.sum(dtype="float64") for e in self.entropies) / max(count, 1))

    def of(self, batch: TrainBatch) -> Scores:
        """Those of the sequences that the policy sampled as the step samples."""
        kept = [i for i, s in enumerate(batch.sequences) if s.on_policy]
        columns = {name: [column[i] for i in kept] for name, column in self.columns.items()}
        return Scores([self.logprobs[i] for i in kept], [self.entropies[i] for i in kept], columns)
