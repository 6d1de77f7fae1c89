"""OGER: teachers' trajectories in each group, and a reward for right answers that are far from them (arXiv 2604.18530).

    sim_i  = mean over the prompt's teacher trajectories j of cos(Enc(rollout_i), Enc(teacher_j));  D_i = 1 - sim_i
    H_i    = entropy of the policy at the last response token of rollout_i, in nats
    R_i    + D_i exp(-H_i) R_i   is what an online rollout is worth, R_i being the verifier's reward; a teacher's row: R_i

Of each group the online rollout with the smallest D gives its place to one of the prompt's trajectories, drawn at random.
Then GRPO. A prompt without a trajectory keeps its plain group.

The full text was not to be had; the formula is that of one technical review. Ours: the encoder, TF-IDF over character n-grams
or any Hugging Face model; a teacher's row has the policy's own log-probabilities for old ones, so that its ratio starts at 1,
and is outside of TIS, entropy and mismatch; trajectories above rollout.max_tokens are left out; each is graded once, when it is
first drawn.

Trap: in a group where all are right, rewards differ by D exp(-H) alone, and dividing by their deviation makes advantages of
about +-1.6 of differences of any size. Such a group keeps its rewards' own scale (`scale_uniform_groups`). Dynamic sampling
leaves it out altogether.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated

import numpy as np
from pydantic import BeforeValidator, Field

from megatron_reheat.clock import Clock
from megatron_reheat.config import Config
from megatron_reheat.config_fields import Section
from megatron_reheat.data.encoders import ModelEncoder, NGramEncoder, TextEncoder, mean_similarity
from megatron_reheat.data.trajectories import Trajectories
from megatron_reheat.losses.advantage import group_advantages
from megatron_reheat.methods.grpo import GRPO, Sampling, Scoring, Tools
from megatron_reheat.types import (
    POLICY,
    At,
    Collected,
    Completion,
    Group,
    Prompt,
    Reward,
    Scores,
    TokenArray,
    TrainBatch,
)

TEACHER = "teacher"
TFIDF = "tfidf"
TEACHERS, ENCODER = "rl.options.teachers", "rl.options.encoder"
SAMPLE = 200  # trajectories that the n-grams' weights and the log's figures are taken from


class Teachers(Section):
    """Files of trajectories, and what joins them to the prompts."""

    path: Annotated[tuple[str, ...], BeforeValidator(lambda path: [path] if isinstance(path, str) else path)] = Field(
        min_length=1, description=".jsonl, .json, .csv (also .gz) or .parquet: one or a list"
    )
    key: str | None = Field(default=None, description="of a record here, naming its prompt; empty: prompt_key")
    prompt_key: str | None = Field(
        default=None, description="of a record of the data, which `key` has to equal; empty: data.prompt_key"
    )
    texts_key: str = Field(default="trajectories", description="of a record here: a response, or a list of them")


@dataclass(frozen=True)
class _Compared:
    """A prompt's rollouts beside its teachers: D, [G], and the trajectory that was drawn, by its place and its tokens."""

    distances: Sequence[float]
    drawn: int
    token_ids: TokenArray | None
    num_trajectories: int
    num_too_long: int


class OGER(GRPO):
    """GRPO with a teacher's response in each group whose prompt has one that fits; its `sampler` is `TEACHER`."""

    class Options(Section):
        """`teachers` has no default; the encoder is ours."""

        teachers: Teachers = Field(description="files of trajectories, and what joins them to the prompts")
        encoder: str = Field(default=TFIDF, min_length=1, description="tfidf, or the folder of a Hugging Face model")
        scale_uniform_groups: bool = Field(
            default=False,
            description="divide by the deviation of the rewards also where all of the verifier's are the same, as the paper "
            "does: advantages of about +-1.6",
        )

    options: Options

    @classmethod
    def problems(cls, config: Config, options: Options) -> Iterator[str]:
        if config.reward.incorrect < 0:
            yield (
                f"rl.method oger multiplies rewards, so that a wrong answer must not be worth less than nothing: set "
                f"reward.incorrect=0 instead of {config.reward.incorrect:g}"
            )
        if config.rl.max_staleness:
            yield "rl.method oger compares groups in the step that samples them; set rl.max_staleness=0"

    def __init__(self, config: Config, options: Options, tools: Tools) -> None:
        super().__init__(config, options, tools)
        assert tools.encode is not None and tools.prompts is not None
        self._encode, self._num_prompts = tools.encode, len(tools.prompts)
        if options.encoder == TFIDF:
            NGramEncoder.check(ENCODER)
        else:
            ModelEncoder.check(ENCODER, options.encoder)
        prompt_key = options.teachers.prompt_key or config.data.prompt_key
        self._teachers = Trajectories(
            options.teachers.path,
            tools.prompts,
            key=options.teachers.key or prompt_key,
            prompt_key=prompt_key,
            texts_key=options.teachers.texts_key,
            section=TEACHERS,
        )
        self._graded: dict[tuple[int, int], tuple[Completion, Reward]] = {}
        self._distances: dict[int, float] = {}  # of a rollout, by its identity
        self._groups: Sequence[Group] = ()
        self._metrics: dict[str, float] = {}

    def describe(self) -> list[str]:
        teachers, sample = self._teachers, self._teachers.sample(SAMPLE)
        too_long = sum(len(self._encode(text)) > self.config.rollout.max_tokens for text in sample)
        text = f"oger: {len(teachers):,} trajectories for {teachers.num_prompts:,} of {self._num_prompts:,} prompts"
        if teachers.num_unknown:
            text += f"; {teachers.num_unknown:,} for no prompt of the run left out"
        if too_long:
            text += f"; {too_long:,} of {len(sample):,} are longer than rollout.max_tokens and left out"
        return [text]

    def collect(self, sampling: Sampling, at: At, clock: Clock) -> Collected:
        self._distances, compared = {}, []

        def complete(groups: Sequence[Group]) -> list[Group]:
            with clock.phase("compare"):
                found = sampling.divide(groups, lambda mine: [self._compare(group, at.seed) for group in mine])
            compared.extend(found)
            for group, c in zip(groups, found, strict=True):
                self._distances |= zip(map(id, group.completions), c.distances, strict=False)
            self._grade(sampling, groups, found, at, clock)
            return [self._with_teacher(group, c) for group, c in zip(groups, found, strict=True)]

        collected = sampling.collect(at, clock, group_size=self.group_size(at), complete=complete)
        covered = [c for c in compared if c.token_ids is not None]
        metrics = {
            "oger/covered_fraction": len(covered) / len(compared),
            "oger/too_long_fraction": sum(c.num_too_long for c in compared)
            / max(sum(c.num_trajectories for c in compared), 1),
        }
        if covered:
            metrics["oger/distance"] = float(np.mean([d for c in covered for d in c.distances]))
        return replace(collected, metrics=collected.metrics | metrics)

    def batch(self, collected: Collected, at: At) -> TrainBatch:
        self._groups = collected.groups
        return super().batch(collected, at)

    def weigh(self, batch: TrainBatch, scores: Scores, scoring: Scoring) -> TrainBatch:
        """With the advantages, which need the entropies of `scores`."""
        batch = super().weigh(batch, scores, scoring)
        entropies = iter(scores.entropies)
        advantages: list[float] = []
        bonuses: list[float] = []
        for group in self._groups:
            added = [
                self._distances.get(id(c), 0.0) * math.exp(-float(entropy[-1])) * r.value
                for c, r, entropy in zip(group.completions, group.rewards, entropies, strict=False)
            ]
            advantages += self._advantages(group, added)
            bonuses += [b for c, b in zip(group.completions, added, strict=True) if c.sampler == POLICY]
        self._metrics = {"oger/bonus": float(np.mean(bonuses)), **self._teacher_metrics(batch)}
        return TrainBatch(tuple(replace(s, advantage=a) for s, a in zip(batch.sequences, advantages, strict=True)))

    def metrics(self) -> dict[str, float]:
        return self._metrics

    def _advantages(self, group: Group, bonuses: Sequence[float]) -> list[float]:
        plain = self.rewards(group)
        scales = self.options.scale_uniform_groups or len(set(plain)) > 1
        rewards = [r + b for r, b in zip(plain, bonuses, strict=True)]
        return group_advantages(rewards, normalize_by_std=scales and self.config.rl.normalize_by_std)

    def _teacher_metrics(self, batch: TrainBatch) -> dict[str, float]:
        rewards = [
            r for g in self._groups for c, r in zip(g.completions, g.rewards, strict=True) if c.sampler == TEACHER
        ]
        if not rewards:
            return {}
        logprobs = [
            s.old_logprobs
            for s in batch.sequences
            if s.completion is not None and s.completion.sampler == TEACHER and s.old_logprobs is not None
        ]
        return {
            "oger/teacher_accuracy": float(np.mean([r.correct for r in rewards])),
            "oger/teacher_logprob": float(np.concatenate(logprobs).mean(dtype=np.float64)),
        }

    @cached_property
    def _encoder(self) -> TextEncoder:
        """Made where it is used: on the ranks that hold an engine."""
        if self.options.encoder == TFIDF:
            return NGramEncoder(self._teachers.sample(SAMPLE))
        return ModelEncoder(self.options.encoder)

    def _compare(self, group: Group, seed: int) -> _Compared:
        texts = self._teachers.of(group.prompt.index)
        encoded = [np.asarray(self._encode(text), np.int32) for text in texts]
        fitting = [i for i, ids in enumerate(encoded) if len(ids) <= self.config.rollout.max_tokens]
        if not fitting:
            return _Compared((), -1, None, len(texts), len(texts))
        rollouts = [self.tools.decode(c.token_ids) for c in group.completions]
        similarity = mean_similarity(self._encoder, rollouts, [texts[i] for i in fitting])
        drawn = fitting[int(np.random.default_rng((seed, group.prompt.index)).integers(len(fitting)))]
        return _Compared((1 - similarity).tolist(), drawn, encoded[drawn], len(texts), len(texts) - len(fitting))

    def _grade(
        self, sampling: Sampling, groups: Sequence[Group], compared: Sequence[_Compared], at: At, clock: Clock
    ) -> None:
        """Grades those drawn trajectories that were not drawn before."""
        new: dict[tuple[int, int], tuple[Prompt, Completion]] = {}
        for group, c in zip(groups, compared, strict=True):
            place = (group.prompt.index, c.drawn)
            if c.token_ids is not None and place not in self._graded:
                unknown = np.zeros(len(c.token_ids), np.float32)
                new[place] = group.prompt, Completion(c.token_ids, unknown, at.temperature, 0, "stop", TEACHER)
        graded = sampling.grade([p for p, _ in new.values()], [(c,) for _, c in new.values()], clock)
        self._graded |= {place: (g.completions[0], g.rewards[0]) for place, g in zip(new, graded, strict=True)}

    def _with_teacher(self, group: Group, compared: _Compared) -> Group:
        """The group with the drawn trajectory in the place of the rollout that is nearest to all of them."""
        if compared.token_ids is None:
            return group
        nearest = int(np.argmin(compared.distances))
        completions, rewards = list(group.completions), list(group.rewards)
        completions[nearest], rewards[nearest] = self._graded[group.prompt.index, compared.drawn]
        return Group(group.prompt, tuple(completions), tuple(rewards))
