"""The tokenizer of a Hugging Face folder, and the tokens that end a response."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_reheat.data.apart import Failed, OverLimit, run_apart
from megatron_reheat.data.chat import MAX_TEMPLATE
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


def stop_token_ids(
    hf: Any, tokenizer: PreTrainedTokenizerBase, hf_folder: Path, *, chat: bool = False
) -> tuple[int, ...]:
    """Every token that ends a response, in ascending order: the eos tokens of tokenizer, config.json (`hf`) and
    generation_config.json together and, with `chat`, what the chat template ends a turn with.

    A base model names the end of a document alone, and would otherwise go on with the user's next turn.

    Raises:
        ConfigError: none of them names a token, or one names what is no token of the model.
    """
    named = {
        "the tokenizer's eos_token": tokenizer.eos_token_id,
        "eos_token_id of config.json": hf.eos_token_id,
        "eos_token_id of generation_config.json": _generation_eos(hf_folder),
        "the chat template's end of a turn": turn_end_id(tokenizer) if chat else None,
    }
    stops: set[int] = set()
    for what, value in named.items():
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < hf.vocab_size:
                raise ConfigError(
                    f"model.hf_path: {hf_folder}: {what} is {value!r}, but the model's tokens are 0 to {hf.vocab_size - 1}; "
                    "correct it"
                )
        stops.update(ids)
    if not stops:
        raise ConfigError(
            f"model.hf_path: {hf_folder}: neither tokenizer nor config.json names an eos token, nor does "
            "generation_config.json, so no response could end; save the tokenizer with its eos_token"
        )
    return tuple(sorted(stops))


def end_token_id(tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], *, chat: bool = False) -> int:
    """The one of `stops` that a worked answer is ended with: as a turn in chat, else the tokenizer's own."""
    for token_id in (turn_end_id(tokenizer) if chat else None, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    return stops[0]


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that follows an answer in the chat template (<|im_end|>, <|eot_id|>, ...), if there is one."""
    answer = "4217"
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": answer}]
    if len(str(tokenizer.chat_template)) > MAX_TEMPLATE:
        return None  # whoever renders prompts with it will say so
    try:
        text = run_apart(lambda: str(tokenizer.apply_chat_template(turns, tokenize=False)))
    except Failed:  # what it cannot render has no end either
        return None
    except OverLimit as error:
        raise ConfigError(
            f"data.template chat: the chat template of {tokenizer.name_or_path} does not render two messages: {error}; "
            "correct the template, or use data.template=raw"
        ) from None
    if answer not in text:
        return None
    after = text.rpartition(answer)[2]
    places = {token_id: after.find(token.content) for token_id, token in tokenizer.added_tokens_decoder.items()}
    return min((t for t, place in places.items() if place >= 0), key=places.__getitem__, default=None)


def _generation_eos(hf_folder: Path) -> Any:
    path = hf_folder / "generation_config.json"
    try:
        return json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    except (OSError, ValueError, AttributeError, RecursionError):
        raise ConfigError(f"model.hf_path: {path} is not a JSON object; save it again, or remove it") from None
