"""A record as the text, tokens, worked answer and verifier of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING, Any, Literal

from megatron_reheat.config_data import DataConfig
from megatron_reheat.data.chat import ChatTemplate, Message, messages_of
from megatron_reheat.data.fields import fill, required
from megatron_reheat.data.records import Record
from megatron_reheat.data.references import gym_entry, reference_text
from megatron_reheat.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RewardKind = Literal["math", "reasoning_gym", "function"]


class Renderer:
    """What a data section makes of a record: the same on every rank and whenever it is asked again.

    `section` is the recipe's (data, eval.data), for errors; `where` names the record in them. Every method raises
    ConfigError for a record that does not fit.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        reward_kind: RewardKind,
        section: str,
        today: date,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.section = section
        self._today = today
        self._reward_kind = reward_kind
        self._leading: list[int] | None = None
        self._chat = None
        if config.template == "chat":
            self._chat = ChatTemplate(tokenizer, config.chat_template_kwargs, section=section, today=today)

    def text(self, record: Record, where: str) -> str:
        """The prompt as the policy reads it: by the chat template, or `raw_template`."""
        record = self._entry(record, where)
        if self._chat is None:
            return self._raw_text(record, where)
        return self._of_messages(self._chat, self._messages(record, where), "prompt", where)

    def hinted_text(self, record: Record, where: str, solution: str | None = None) -> str:
        """The prompt of a teacher that knows more: `hint_template` stands where the prompt's own text does, in a chat that of
        its last message. `{prompt}` in it is that text, `{solution}` is `solution` or else the record's field."""
        template = self.config.hint_template
        assert template is not None  # the methods that have such a teacher ask for it
        record = self._entry(record, where)
        messages = [] if self._chat is None else self._messages(record, where)
        own = messages[-1]["content"] if messages else self._raw_text(record, where)
        fields = {**record, "prompt": own} | ({} if solution is None else {"solution": solution})
        text = fill(template, fields, f"{self.section}.hint_template", where)
        if self._chat is None:
            return _encodable(text, "hint", where)
        return self._of_messages(self._chat, [*messages[:-1], {**messages[-1], "content": text}], "hint", where)

    def _raw_text(self, record: Record, where: str) -> str:
        text = fill(self.config.raw_template, record, f"{self.section}.raw_template", where)
        return _encodable(text, "prompt", where)

    def _messages(self, record: Record, where: str) -> list[Message]:
        config, place = self.config, f"{self.section}.prompt_key"
        prompt = required(record, config.prompt_key, place, where)
        messages = messages_of(prompt, f"{place} {config.prompt_key!r}", where)
        if config.system_prompt is not None:
            if messages[0]["role"] == "system":
                raise ConfigError(
                    f"{self.section}.system_prompt is given, and {where} begins with a system message; clear one of them"
                )
            messages.insert(0, {"role": "system", "content": config.system_prompt})
        return messages

    def _of_messages(self, chat: ChatTemplate, messages: Sequence[Message], what: str, where: str) -> str:
        for message in messages:  # before the template, which may cut a text between two halves of a character
            _encodable(message["content"], what, where)
        return _encodable(chat.render(messages, where), what, where)

    def solution(self, record: Record, where: str) -> str | None:
        """The worked answer; None where there is no `solution_template`."""
        template = self.config.solution_template
        if template is None:
            return None
        record = self._entry(record, where)
        return _encodable(fill(template, record, f"{self.section}.solution_template", where), "worked answer", where)

    def verifier(self, record: Record, where: str) -> dict[str, Any]:
        """What graders get: `answer`; of reasoning-gym `task` and `entry`; of functions `record` and `where`."""
        config = self.config
        if self._reward_kind == "function":
            return {"record": record, "where": where}
        if self._reward_kind == "reasoning_gym":
            task, entry = gym_entry(record, where)
            if not task:
                raise ConfigError(
                    f"reward.kind reasoning_gym: {where} has no metadata.source_dataset, the task that can score it; "
                    "use entries made by reasoning-gym, or reward.kind=math"
                )
            return {"task": task, "entry": entry}
        place = f"{self.section}.answer_key"
        answer = required(record, config.answer_key, place, where)
        text = reference_text(answer, f"{place} {config.answer_key!r} in {where}")
        return {"answer": _encodable(text, "answer", where)}

    def _entry(self, record: Record, where: str) -> Record:
        """The record with its metadata read, where that may be JSON text."""
        return gym_entry(record, where)[1] if self._reward_kind == "reasoning_gym" else record

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts. Special tokens stand where the text has them, and raw text begins with the tokenizer's own."""
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        wanted = self.config.add_special_tokens
        if wanted is False or (wanted == "auto" and self._chat is not None):
            return encoded
        if self._leading is None:
            self._leading = tokens_before_text(self.tokenizer, texts[0])
        leading = self._leading
        return [ids if ids[: len(leading)] == leading else [*leading, *ids] for ids in encoded]

    def notes(self, text: str) -> list[str]:
        """What a reader of the recipe may not expect of its prompts, of which `text` is one."""
        config, section = self.config, self.section
        if self._chat is None:
            return [
                f"{section}.{key} is for {section}.template=chat; the raw template leaves it out"
                for key in ("system_prompt", "chat_template_kwargs")
                if getattr(config, key)
            ]
        notes = [
            f"the chat template does not know {name!r} of {section}.chat_template_kwargs"
            for name in self._chat.unknown_kwargs
        ]
        if self._chat.prints_date:
            notes.append(f"the chat template prints the date, {self._today} in all prompts of this run")
        if config.system_prompt is not None and config.system_prompt.strip() not in text:
            notes.append(f"the chat template leaves {section}.system_prompt out or changes it")
        leading = tokens_before_text(self.tokenizer, text)
        if config.add_special_tokens == "auto" and self.encode([text])[0][: len(leading)] != leading:
            shown = "".join(self.tokenizer.convert_ids_to_tokens(leading))
            notes.append(f"the chat template writes no {shown}; {section}.add_special_tokens=true would add it")
        return notes


def tokens_before_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """What the tokenizer itself begins a text with, `text` for one: a BOS for Llama, nothing for Qwen3.

    What it adds behind a text (the eos of T5, say) is not for a prompt, which the response continues.
    """
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer(text)["input_ids"]
    return whole[: next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)]


def _encodable(text: str, what: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the {what} of {where} holds {text[error.start]!a}, half of a UTF-16 pair, which no tokenizer reads; remove it"
        ) from None
    return text
