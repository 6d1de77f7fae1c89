"""Messages rendered by a tokenizer's chat template, whose errors and whose clock are not left to chance."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from typing import TYPE_CHECKING, Any

from megatron_reheat.data.apart import run_apart
from megatron_reheat.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

MAX_TEMPLATE = 200_000  # characters; the longest in use have 20,000
# what apply_chat_template takes for itself; `chat_template`, `tools` and `documents` may be given
RESERVED = (
    "conversation", "messages", "add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation",
    "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "strftime_now",
)  # fmt: skip


class ChatTemplate:
    """The template that `kwargs` choose, with `today` for the date of every prompt.

    Templates may print the date. A run has one: the prompts are the same on every rank and when it is resumed.

    Raises:
        ConfigError: there is no template, or not one that is meant; the message begins with `section`, the recipe's.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], *, section: str, today: date
    ) -> None:
        self._tokenizer = tokenizer
        self._section = section
        if taken := [name for name in RESERVED if name in kwargs]:
            raise ConfigError(
                f"{section}.chat_template_kwargs must not hold {', '.join(taken)}: these are chosen by the trainer"
            )
        self._source = self._choose(kwargs)
        if len(self._source) > MAX_TEMPLATE:
            raise ConfigError(
                f"{section}.template chat: the chat template of {_name(tokenizer)} has {len(self._source):,} characters, and "
                f"{MAX_TEMPLATE:,} are the most; correct it, or use {section}.template=raw"
            )
        self._was_tried = False
        self._kwargs = {**kwargs, "chat_template": self._source}
        if self.prints_date:
            self._kwargs["strftime_now"] = datetime.combine(today, time()).strftime

    @property
    def prints_date(self) -> bool:
        """Whether the template asks for the date, by `strftime_now`."""
        return self._mentions("strftime_now")

    @property
    def unknown_kwargs(self) -> list[str]:
        """Those that the template does not mention, so that they change nothing."""
        return [name for name in self._kwargs if name != "chat_template" and not self._mentions(name)]

    def render(self, messages: Sequence[Message], where: str) -> str:
        """
        Raises:
            ConfigError: the template refuses the messages of the record that `where` names.
        """
        try:
            if not self._was_tried:
                run_apart(lambda: self._rendered(messages))
                self._was_tried = True
            return self._rendered(messages)
        except Exception as error:  # a template is a program: it raises its own errors, and any of Python's
            roles = ", ".join(str(message["role"]) for message in messages)
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                f"{self._section}.template chat: the chat template of {_name(self._tokenizer)} does not render {where} "
                f"(roles: {roles}): {reason}"
            ) from None

    def _rendered(self, messages: Sequence[Message]) -> str:
        text = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False, **self._kwargs
        )
        assert isinstance(text, str)
        return text

    def _choose(self, kwargs: Mapping[str, Any]) -> str:
        templates, chosen = self._tokenizer.chat_template or "", kwargs.get("chat_template")
        key, name = f"{self._section}.chat_template_kwargs", _name(self._tokenizer)
        if isinstance(templates, dict):
            fitting = "tool_use" if kwargs.get("tools") and "tool_use" in templates else "default"
            if (chosen or fitting) in templates:
                return templates[chosen or fitting]
            if chosen is None:
                raise ConfigError(
                    f"{self._section}.template chat: {name} has several chat templates and none is the default; name one "
                    f"({', '.join(sorted(templates))}) as {key}.chat_template"
                )
        if chosen is not None:
            if not isinstance(chosen, str) or "{" not in chosen:
                known = f"one of {', '.join(sorted(templates))}, or " if isinstance(templates, dict) else ""
                raise ConfigError(f"{key}.chat_template {chosen!r} is not {known}a template's text; correct it")
            return chosen
        if not templates:
            raise ConfigError(
                f"{self._section}.template chat: the tokenizer has no chat template ({name}); use "
                f"{self._section}.template=raw"
            )
        return templates

    def _mentions(self, name: str) -> bool:
        return re.search(rf"\b{re.escape(name)}\b", self._source) is not None


def messages_of(value: Any, key: str, where: str) -> list[Message]:
    """The messages of a prompt column: its text as the user's, or the list that it holds.

    Raises:
        ConfigError: naming the column as `key`, and the record.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list | tuple):
        raise ConfigError(
            f"{key} of {where} must be text or a list of messages with role and content, not {_kind(value)}"
        )
    messages = []
    for number, message in enumerate(value):
        place = f"message {number} under {key} of {where}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ConfigError(f"{place} must have role and content, not be {_kind(message)}")
        for part in ("role", "content"):
            if not isinstance(message[part], str):
                raise ConfigError(f"{place} must have text as its {part}, not {_kind(message[part])}")
        # Arrow gives every message the fields of all others, as nulls
        messages.append({name: part for name, part in message.items() if part is not None})
    last = messages[-1]
    if last["role"] == "assistant":
        raise ConfigError(
            f"{key} of {where} ends with the assistant's message, which would give the answer away; name the column of "
            "the prompt alone"
        )
    if not last["content"].strip():
        raise ConfigError(f"the last message under {key} of {where} is empty")
    return messages


def _kind(value: Any) -> str:
    return "null" if value is None else repr(value) if isinstance(value, int | float) else f"a {type(value).__name__}"


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return getattr(tokenizer, "name_or_path", "") or "the tokenizer"
