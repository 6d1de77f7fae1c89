"""What crosses between trainer and engine process. Samples travel as flat arrays, so that pickling stays cheap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_reheat.types import Completion, FloatArray, SamplingParams, TokenArray


@dataclass(frozen=True)
class WorkerSettings:
    """What the trainer asks of a new engine process: vLLM's engine arguments, and where to print from now on."""

    options: dict[str, Any]
    log_file: str


@dataclass(frozen=True)
class WorkerReady:
    """First message of an engine process. `at` is when it was ready, by the machine's monotonic clock (s)."""

    vocab_size: int
    max_model_len: int
    at: float


@dataclass(frozen=True)
class SampleRequest:
    """P prompts, end to end in `token_ids`; `base_seed` is below 2**32.

    With `apart` every completion is a request of its own to vLLM, and sent as soon as it is finished. vLLM would make those
    requests of `n` itself, in the same order and with the same seeds.
    """

    token_ids: TokenArray
    lengths: NDArray[np.int32]
    n: int
    base_seed: int
    temperature: float
    top_p: float
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    apart: bool = False

    @classmethod
    def pack(
        cls, prompts: Sequence[TokenArray], params: SamplingParams, n: int, seed: int, *, apart: bool = False
    ) -> SampleRequest:
        """At least one prompt; `seed` is 0 or more, however large."""
        # hashed, so that calls with seed and seed + 1 share no streams though each call uses P x n consecutive ones
        base_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        return cls(
            token_ids=np.concatenate(prompts),
            lengths=np.asarray([len(p) for p in prompts], dtype=np.int32),
            n=n,
            base_seed=base_seed,
            temperature=params.temperature,
            top_p=params.top_p,
            max_tokens=params.max_tokens,
            stop_token_ids=params.stop_token_ids,
            apart=apart,
        )

    @property
    def samples(self) -> int:
        """Completions of one request to vLLM."""
        return 1 if self.apart else self.n

    def seed_of(self, place: int) -> int | None:
        """Of the request whose first completion is the `place`-th of the P x n; None where nothing is drawn."""
        # vLLM gives sample i the seed + i, so prompts are n apart
        return None if self.temperature == 0 else self.base_seed + place

    def prompts(self) -> list[list[int]]:
        """Token ids, one list a prompt."""
        return [p.tolist() for p in _split(self.token_ids, self.lengths)]


@dataclass(frozen=True)
class SampleReply:
    """Completions, end to end; `places` are theirs among the P x n, those of one prompt next to each other."""

    places: NDArray[np.int32]
    token_ids: TokenArray
    logprobs: FloatArray
    lengths: NDArray[np.int32]
    stopped: NDArray[np.bool_]
    policy_version: int

    def unpack(self, sampling_temperature: float) -> list[tuple[int, Completion]]:
        """Each with its place."""
        tokens = _split(self.token_ids, self.lengths)
        logprobs = _split(self.logprobs, self.lengths)
        return [
            (int(place), Completion(t, lp, sampling_temperature, self.policy_version, "stop" if stopped else "length"))
            for place, t, lp, stopped in zip(self.places, tokens, logprobs, self.stopped, strict=True)
        ]


def _split(flat: NDArray, lengths: NDArray[np.int32]) -> list[NDArray]:
    return np.split(flat, np.cumsum(lengths)[:-1])
