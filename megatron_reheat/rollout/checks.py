"""What no engine is asked, because vLLM would fail on it late or never answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_reheat.config_fields import MAX_SAMPLES, check_temperature
from megatron_reheat.errors import ConfigError
from megatron_reheat.types import SamplingParams, TokenArray


def check_prompts(prompts: Sequence[Sequence[int]], max_model_len: int, vocab_size: int) -> list[TokenArray]:
    """The prompts as arrays.

    Raises:
        ConfigError: one is empty, too long or holds a token outside the vocabulary; the message names its position.
    """
    arrays = []
    for position, prompt in enumerate(prompts):
        array = np.asarray(prompt, dtype=np.int64)
        if not 0 < len(array) < max_model_len:
            raise ConfigError(
                f"prompt {position} has {len(array)} tokens; the engine takes 1 to {max_model_len - 1} "
                f"(rollout.max_model_len {max_model_len} less one for the response)"
            )
        if array.min() < 0 or array.max() >= vocab_size:
            worst = array.min() if array.min() < 0 else array.max()
            raise ConfigError(f"prompt {position} holds token id {worst}, outside the vocabulary of {vocab_size}")
        arrays.append(array.astype(np.int32))
    return arrays


def check_params(params: SamplingParams, n: int, vocab_size: int) -> None:
    """
    Raises:
        ConfigError: naming the setting that cannot be served.
    """
    if n < 1 or params.max_tokens < 1:
        raise ConfigError(f"need at least one completion of one token, got n={n}, max_tokens={params.max_tokens}")
    if n > MAX_SAMPLES:
        raise ConfigError(f"n {n} is above vLLM's limit of {MAX_SAMPLES} completions of a prompt")
    if params.temperature != 0:
        try:
            check_temperature(params.temperature)
        except ValueError as error:
            raise ConfigError(f"temperature {params.temperature}: {error}, and 0 is greedy") from None
    if not 0 < params.top_p <= 1:
        raise ConfigError(f"top_p {params.top_p} must be in (0, 1]")
    if params.temperature == 0 and n > 1:
        raise ConfigError(f"temperature 0 is greedy: {n} completions would be the same one; use n=1")
    outside = [t for t in params.stop_token_ids if not 0 <= t < vocab_size]
    if outside:
        raise ConfigError(f"stop token {outside[0]} is outside the vocabulary of {vocab_size}")
