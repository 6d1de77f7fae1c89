"""GRPO and DAPO (arXiv 2402.03300, 2503.14476), and the places at which another method may differ from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor

from megatron_reheat.clock import Clock
from megatron_reheat.config import Config
from megatron_reheat.config_fields import Section
from megatron_reheat.data.mixture import RunPrompts
from megatron_reheat.losses.advantage import group_advantages, overlong_penalty
from megatron_reheat.losses.policy_gradient import SurrogateLoss, clipped_surrogate, surrogate_loss, token_importance
from megatron_reheat.parallel.attention import AttentionTerm
from megatron_reheat.parallel.packing import Loss, MicroBatch, PerToken
from megatron_reheat.types import (
    POLICY,
    At,
    Collected,
    Completion,
    Group,
    HintSource,
    Prompt,
    Scores,
    TokenArray,
    TrainBatch,
    TrainSequence,
)

T = TypeVar("T")
U = TypeVar("U")
Complete = Callable[[Sequence[Group]], list[Group]]


class Sampling(Protocol):
    """What a method may ask for while it collects; every call is a collective over all ranks (`stages.collect`)."""

    def collect(self, at: At, clock: Clock, *, group_size: int, complete: Complete | None = None) -> Collected:
        """The step's graded groups: `group_size` completions of the policy a prompt, drawn in the order of the data, as many
        generation batches as dynamic sampling asks for. `complete` may change each batch's groups, one for one, before
        they are filtered."""
        ...

    def again(
        self,
        prompts: Sequence[Prompt],
        n: int,
        temperature: float,
        clock: Clock,
        *,
        sampler: str = POLICY,
        top_p: float = 1.0,
    ) -> list[Group]:
        """`n` more graded completions of prompts that were drawn already, from any sampler at any temperature."""
        ...

    def grade(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], clock: Clock
    ) -> list[Group]:
        """Groups of completions that no sampler of the run made."""
        ...

    def divide(self, items: Sequence[T], work: Callable[[Sequence[T]], Iterable[U]]) -> list[U]:
        """What `work` makes of each item, for what is too slow to be done on every rank alike."""
        ...


class Scoring(Protocol):
    """What a method may ask for once the batch is made; every call is a collective over all ranks. `at` is where the run is."""

    @property
    def at(self) -> At:
        """The step that the batch is of."""
        ...

    def score(self, batch: TrainBatch) -> Scores:
        """One pass of the policy before this step's first update, at the step's temperature."""
        ...

    def reference(self, batch: TrainBatch) -> Scores:
        """The same of the frozen policy with which this run's RL began; for a method that says so in `needs_reference`."""
        ...


@dataclass(frozen=True)
class Tools:
    """What a method may need of model and data, before any weights are loaded.

    `hf` is the Hugging Face config. `decode` gives the text of a response. `hinted_prompt` gives the token ids of a prompt as
    `data.hint_template` shows it to a teacher, with a solution in the place of the record's own where one is given; None if
    they are more than `data.max_hinted_prompt_tokens`. `encode` turns the text of a response into its tokens, the end included.
    """

    hf: Any
    decode: Callable[[TokenArray], str]
    hinted_prompt: Callable[[Prompt, str | None], TokenArray | None]
    encode: Callable[[str], list[int]] | None = None
    prompts: RunPrompts | None = None


ASSUMED_ACCURACY = 0.5  # where costs depend on how much is right


@dataclass(frozen=True)
class Costs:
    """What a step takes beyond GRPO's, as `reheat check` estimates it; each a share of the step's own
    `rl.prompts_per_step` x `rl.group_size` sequences, in the mean over a run.

    `sampled` are completions besides, below 0 where there are fewer, `frozen` those of each model of `rl.samplers`, `trained`
    sequences that the updates train on besides, `scored` sequences that are read before the first update and `read` those
    that are read inside the updates, both without gradient. `heads` counts the vocabularies that the loss makes, with
    gradient, beside the policy's own.
    """

    sampled: float = 0.0
    trained: float = 0.0
    scored: float = 0.0
    read: float = 0.0
    heads: float = 0.0
    frozen: Mapping[str, float] = field(default_factory=dict)


class GRPO:
    """The methods below are called once a step, in this order. Another method overrides what its paper changes, and nothing
    else.
    """

    class Options(Section):
        """Keys of `rl.options`; GRPO has none: its own are those of `rl`."""

    samplers: ClassVar[tuple[str, ...]] = ()  # frozen models it samples from, by their names in `rl.samplers`
    # keys of `rl` that `loss` follows; others of these are refused. A class with a `loss` of its own names them anew
    loss_keys: ClassVar[tuple[str, ...]] = ("tis_cap", "entropy_coef", "kl_coef")
    # whether its ratio is to the policy that sampled, be that of now or of a step before (`rollout.overlap`)
    anchored_at_sampler: ClassVar[bool] = False
    # whether nothing but `surrogate_loss` needs the batch's scores, which the only update of a step then makes itself
    scores_in_loss: ClassVar[bool] = True
    columns: Mapping[str, PerToken] = {}  # what it needs scored beside log-probabilities and entropies
    # whether the loss needs all of a response's log-probabilities for its gradient; under context parallelism other ranks have
    # some of them, and what it sums over a response goes through `MicroBatch.total`
    whole_sequences: ClassVar[bool] = False
    taps: tuple[int, ...] = ()  # layers, counted from 1, whose states the loss reads through the model's own head

    def __init_subclass__(cls) -> None:
        if "loss" in vars(cls) and "loss_keys" not in vars(cls):
            cls.loss_keys = ()
        if {"loss", "weigh", "columns"} & vars(cls).keys() and "scores_in_loss" not in vars(cls):
            cls.scores_in_loss = False

    def __init__(self, config: Config, options: Any, tools: Tools) -> None:
        """
        Raises:
            ConfigError: the model is not what the method needs.
        """
        self.config, self.options, self.tools = config, options, tools

    @classmethod
    def problems(cls, config: Config, options: Any) -> Iterator[str]:
        """Why the rest of the recipe makes no sense beside this method, each naming the key to change."""
        yield from ()

    @classmethod
    def hint(cls, options: Any) -> HintSource | None:
        """What a teacher is shown through `data.hint_template`, which is then checked with the data: the record's own fields,
        or a correct response of the policy as `{solution}`."""
        return None

    @classmethod
    def needs_reference(cls, config: Config, options: Any) -> bool:
        """Whether a frozen copy of the policy is kept for `Scoring.reference`: one more set of weights in host memory."""
        return config.rl.kl_coef > 0

    @classmethod
    def costs(cls, config: Config, options: Any) -> Costs:
        """What a step takes beyond GRPO's: a method that samples or reads more says so here."""
        return Costs()

    def describe(self) -> list[str]:
        """What the run's log tells of the method at its start, a line each."""
        return []

    def group_size(self, at: At) -> int:
        """Completions that the policy samples a prompt; at least one, because the controller reads its entropy off them."""
        return self.config.rl.group_size

    def collect(self, sampling: Sampling, at: At, clock: Clock) -> Collected:
        """Samples and grades."""
        return sampling.collect(at, clock, group_size=self.group_size(at))

    def batch(self, collected: Collected, at: At) -> TrainBatch:
        """Sequences with group-relative advantages."""
        return TrainBatch(tuple(s for group in collected.groups for s in self.sequences(group, at)))

    def sequences(self, group: Group, at: At) -> list[TrainSequence]:
        """A group's, in order."""
        advantages = group_advantages(self.rewards(group), normalize_by_std=self.config.rl.normalize_by_std)
        return [
            replace(TrainSequence.of(group.prompt, completion, at.temperature), advantage=advantage)
            for completion, advantage in zip(group.completions, advantages, strict=True)
        ]

    def rewards(self, group: Group) -> list[float]:
        """What advantages are made of: the grades, with the overlong penalty added."""
        return [r.value + self._overlong(c) for c, r in zip(group.completions, group.rewards, strict=True)]

    def weigh(self, batch: TrainBatch, scores: Scores, scoring: Scoring) -> TrainBatch:
        """Called with the scores of every sequence, before the first update: whatever follows from the whole batch.

        Of a method that leaves this as it is, a step with one update has no pass that scores (`scores_in_loss`).
        """
        return batch.with_old_logprobs(scores.logprobs)

    def views(self, minibatch: TrainBatch) -> Mapping[str, TrainBatch]:
        """The same responses, in the same order, behind other prompts, by name. They are read without gradient at the weights
        of this optimizer step; those that the loss asks nothing of are `left_out`."""
        return {}

    def loss(self, at: At) -> Loss:
        """Of one minibatch. `micro.readings` holds the vocabularies of the views and, as `layerN`, of the taps."""
        rl = self.config.rl
        return partial(
            surrogate_loss,
            surrogate=self.surrogate(),
            sampling_temperature=at.temperature,
            tis_cap=rl.tis_cap,
            entropy_coef=self.entropy_coef,
            kl_coef=rl.kl_coef,
            kl_estimator=rl.kl_estimator,
            importance=self.importance,
        )

    @property
    def entropy_coef(self) -> float:
        """Of the bonus in this step's loss."""
        return self.config.rl.entropy_coef

    def surrogate(self) -> SurrogateLoss:
        """The policy gradient's part of the loss; importance sampling, entropy bonus and reference policy come on top."""
        rl = self.config.rl
        return partial(clipped_surrogate, clip_low=rl.clip_low, clip_high=rl.clip_high, dual_clip=rl.dual_clip)

    def importance(self, micro: MicroBatch) -> Tensor:
        """[T] what tokens count by that another policy than the old one sampled; `rl.tis_cap` truncates it."""
        return token_importance(micro)

    def attention(self) -> AttentionTerm | None:
        """What the loss asks of how layers attend."""
        return None

    def metrics(self) -> dict[str, float]:
        """What the step's record shows of the method itself, under its name."""
        return {}

    def state(self) -> dict[str, Any]:
        """What must survive a restart, as JSON."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` returned."""

    def _overlong(self, completion: Completion) -> float:
        rl = self.config.rl
        limits = {"max_tokens": self.config.rollout.max_tokens, "buffer": rl.overlong_buffer}
        return overlong_penalty(len(completion.token_ids), **limits, factor=rl.overlong_penalty)
