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
    """P prompts, end to end in `token_ids`; `base_seed` is below 2**32."""

    token_ids: TokenArray
    lengths: NDArray[np.int32]
    n: int
    base_seed: int
    temperature: float
    top_p: float
    max_tokens: int
    stop_token_ids: tuple[int, ...]

    @classmethod
    def pack(cls, prompts: Sequence[TokenArray], params: SamplingParams, n: int, seed: int) -> SampleRequest:
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
        )

    def prompts(self) -> list[list[int]]:
        """Token ids, one list a prompt."""
        return [p.tolist() for p in _split(self.token_ids, self.lengths)]


@dataclass(frozen=True)
class SampleReply:
    """P x n completions, end to end, those of one prompt next to each other."""

    token_ids: TokenArray
    logprobs: FloatArray
    lengths: NDArray[np.int32]
    stopped: NDArray[np.bool_]
    policy_version: int

    def unpack(self, n: int, sampling_temperature: float) -> list[list[Completion]]:
        """[P][n], in the order of the prompts."""
        tokens = _split(self.token_ids, self.lengths)
        logprobs = _split(self.logprobs, self.lengths)
        completions = [
            Completion(t, lp, sampling_temperature, self.policy_version, "stop" if stopped else "length")
            for t, lp, stopped in zip(tokens, logprobs, self.stopped, strict=True)
        ]
        return [completions[i : i + n] for i in range(0, len(completions), n)]


def _split(flat: NDArray, lengths: NDArray[np.int32]) -> list[NDArray]:
    return np.split(flat, np.cumsum(lengths)[:-1])
