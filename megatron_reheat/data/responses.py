"""Sampled tokens as the text that is graded and logged, and the way back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def response_tokens(tokenizer: PreTrainedTokenizerBase, text: str, end: int) -> list[int]:
    """A response that somebody wrote, as the policy would have sampled it, with the token that ends it."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], end]


def response_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], stop_token_ids: Collection[int]) -> str:
    """What a policy wrote, without the tokens that end or fill a response.

    Other special tokens stay: a tokenizer may have `<answer>` and `</answer>` as such, which graders look for.
    """
    unwritten = {*stop_token_ids, tokenizer.eos_token_id, tokenizer.pad_token_id}
    written = [token_id for token_id in token_ids if token_id not in unwritten]
    text = tokenizer.decode(written, skip_special_tokens=False)
    assert isinstance(text, str)
    return text
