"""The tokenizer of a Hugging Face folder, and the tokens that end a response."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_reheat.errors import ConfigError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def read_tokenizer(hf_folder: Path) -> PreTrainedTokenizerBase:
    """
    Raises:
        ConfigError: the folder has no tokenizer, or a damaged one.
    """
    # without these files transformers makes up a tokenizer with an empty vocabulary
    if not any((hf_folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(
            f"model.hf_path: {hf_folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); save the tokenizer "
            "next to the model"
        )
    try:
        return AutoTokenizer.from_pretrained(hf_folder)
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        raise ConfigError(
            f"model.hf_path: the tokenizer in {hf_folder} cannot be read ({str(error).splitlines()[0]}); save it again"
        ) from None


def stop_token_ids(hf: Any, tokenizer: PreTrainedTokenizerBase, hf_folder: Path) -> tuple[int, ...]:
    """The eos tokens that the tokenizer and the model's configuration `hf` name, in ascending order.

    Raises:
        ConfigError: neither names one.
    """
    stops = {tokenizer.eos_token_id, *_as_list(hf.eos_token_id)} - {None}
    if not stops:
        raise ConfigError(
            f"{hf_folder}: neither tokenizer nor config.json names an eos token, so no response could end"
        )
    return tuple(sorted(stops))


def _as_list(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
