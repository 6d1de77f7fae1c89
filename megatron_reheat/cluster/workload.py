"""What a step works on: response lengths, batches and how they are cut, and the models beside the policy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

from megatron_reheat.cluster.gpus import Gpu
from megatron_reheat.config import Config
from megatron_reheat.errors import ConfigError
from megatron_reheat.methods import MethodChoice, choose_method
from megatron_reheat.methods.grpo import Costs
from megatron_reheat.model.architecture import Architecture

EULER_GAMMA = 0.5772


@dataclass(frozen=True)
class Lengths:
    """Response lengths: exponential with `scale` tokens, cut at `cap`."""

    scale: float
    cap: int

    @classmethod
    def from_mean(cls, mean: float, cap: int) -> Lengths:
        """Raises ConfigError unless 0 < mean < cap."""
        if not 0 < mean < cap:
            raise ConfigError(f"--mean-tokens {mean:g} must lie between 0 and rollout.max_tokens {cap}")
        low, high = 0.0, 1.0
        while cls(high, cap).mean < mean and high < 1e9:
            high *= 2
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if cls(middle, cap).mean < mean else (low, middle)
        return cls(high, cap)

    @property
    def mean(self) -> float:
        """Tokens, of responses that are cut at `cap`."""
        return self.scale * -math.expm1(-self.cap / self.scale)

    @property
    def square_mean(self) -> float:
        """Mean of the squared lengths, tokens^2."""
        x = self.cap / self.scale
        if x < 1e-3:  # the closed form cancels to noise where nearly all responses reach the cap
            return self.cap**2 * (1 - 2 * x / 3)
        return 2 * self.scale**2 * (1 - math.exp(-x) * (1 + x))

    def longest(self, num_sequences: float) -> float:
        """Expected longest of `num_sequences`, in tokens."""
        return min(self.cap, self.scale * (math.log(max(num_sequences, 1.0)) + EULER_GAMMA))


@dataclass(frozen=True)
class Batch:
    """One step's sequences on all ranks, and how they are cut. `minibatches` is the number of optimizer steps, `data_size` that
    of micro-batches at a time, each of which a block of ranks shares."""

    prompts: int
    group_size: int
    minibatches: int
    lengths: Lengths
    prompt_tokens: float
    data_size: int
    num_engines: int
    microbatch_tokens: int

    @property
    def sequences(self) -> int:
        """Of the step, on all ranks together."""
        return self.prompts * self.group_size

    @property
    def tokens(self) -> float:
        """Of the step's prompts and responses, on all ranks together, expected."""
        return self.sequences * (self.prompt_tokens + self.lengths.mean)

    @property
    def tokens_per_block(self) -> float:
        """Of one minibatch, on the fullest block: a sequence is never split over several, so the longest is a lower bound."""
        even = self.tokens / self.minibatches / self.data_size
        return max(even, self.prompt_tokens + self.lengths.longest(self.sequences / self.minibatches))

    @property
    def microbatches(self) -> int:
        """Of one minibatch on the fullest block, if packing left no gaps."""
        return math.ceil(self.tokens_per_block / self.microbatch_tokens)

    @property
    def sequences_per_engine(self) -> int:
        """On the fullest engine: prompts are dealt out whole."""
        return math.ceil(self.prompts / self.num_engines) * self.group_size

    @property
    def resident_tokens(self) -> float:
        """Mean length so far of a sequence that is met at a random decoding step."""
        return self.prompt_tokens + self.lengths.square_mean / (2 * self.lengths.mean)

    @property
    def context(self) -> float:
        """Token-weighted mean length of a sequence, which attention's work is proportional to."""
        p, x = self.prompt_tokens, self.lengths
        return (p * p + 2 * p * x.mean + x.square_mean) / (p + x.mean)


@dataclass(frozen=True)
class FrozenShape:
    """A model of `rl.samplers`: `share` of a step's sequences are its completions, in the mean over the run."""

    model: Architecture
    dtype: str
    share: float


@dataclass(frozen=True)
class Workload:
    """A recipe on `num_gpus` devices: what its steps are made of. `mean_tokens` is the mean response under rollout.max_tokens.

    `frozen` are the models that are sampled from besides, whose responses are taken to be as long.
    """

    config: Config
    model: Architecture
    gpu: Gpu
    num_gpus: int
    mean_tokens: float
    prompt_tokens: float
    frozen: Mapping[str, FrozenShape] = field(default_factory=dict)

    @cached_property
    def samplers(self) -> dict[str, Self]:
        """The same run as the engines of each frozen model see it."""
        return {
            name: replace(
                self,
                model=shape.model,
                frozen={},
                config=self.config.model_copy(
                    update={"rollout": self.config.rollout.model_copy(update={"dtype": shape.dtype})}
                ),
            )
            for name, shape in self.frozen.items()
        }

    @cached_property
    def data_size(self) -> int:
        """Micro-batches at a time (DP); raises ConfigError where the layout does not fit `num_gpus`."""
        return self.config.data_parallel(self.num_gpus)

    @property
    def num_replicas(self) -> int:
        """Copies of the model (DP x CP)."""
        return self.data_size * self.config.parallel.context

    @cached_property
    def num_engines(self) -> int:
        """Servers run on GPUs of their own, `rollout.tensor` each, that `num_gpus` does not count."""
        rollout = self.config.rollout
        if rollout.mode == "server":
            return len(rollout.servers) or rollout.num_servers
        return self.num_gpus // rollout.tensor if rollout.mode == "colocated" else self.num_replicas

    @cached_property
    def rl_batch(self) -> Batch:
        """One RL step. Raises ConfigError unless `mean_tokens` lies between 0 and rollout.max_tokens."""
        rl = self.config.rl
        lengths = Lengths.from_mean(self.mean_tokens, self.config.rollout.max_tokens)
        updates = rl.prompts_per_step // (rl.minibatch_prompts or rl.prompts_per_step)
        return self._batch(rl.prompts_per_step, rl.group_size, updates, lengths)

    @cached_property
    def method(self) -> MethodChoice:
        """What `rl.method` names; raises ConfigError as `choose_method` does."""
        return choose_method(self.config)

    @cached_property
    def costs(self) -> Costs:
        """What a step of `rl.method` takes beyond GRPO's."""
        return self.method.costs(self.config)

    @property
    def hinted_batch(self) -> Batch:
        """The RL batch as a teacher reads it: behind prompts that show a solution about as long as a response, if any."""
        if self.method.cls.hint(self.method.options) is None:
            return self.rl_batch
        hinted = min(self.config.data.max_hinted_prompt_tokens, self.prompt_tokens + self.rl_batch.lengths.mean)
        return replace(self.rl_batch, prompt_tokens=hinted)

    @cached_property
    def reheat_batch(self) -> Batch:
        """The same responses, cut at reheat.max_tokens."""
        reheat = self.config.reheat
        lengths = Lengths(self.rl_batch.lengths.scale, self.config.reheat_tokens)
        return self._batch(reheat.prompts_per_step, reheat.group_size, 1, lengths)

    def _batch(self, prompts: int, group_size: int, updates: int, lengths: Lengths) -> Batch:
        microbatch_tokens = self.config.parallel.microbatch_tokens
        data, engines = self.data_size, self.num_engines
        return Batch(prompts, group_size, updates, lengths, self.prompt_tokens, data, engines, microbatch_tokens)
