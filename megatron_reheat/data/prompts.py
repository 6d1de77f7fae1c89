"""Records become prompts (templates, tokens, length limits, verifiers), drawn in a resumable order.

Everything here is a function of the configuration alone, so that every rank holds the same prompts in the same order.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from megatron_reheat.config import DataConfig
from megatron_reheat.data.sources import Record, read_records
from megatron_reheat.errors import ConfigError
from megatron_reheat.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RewardKind = Literal["math", "reasoning_gym"]


@dataclass(frozen=True)
class PromptDataset:
    """Prompts in a fixed order; `dataset[i].index == i`.

    `num_skipped` counts the prompts left out for their length, `num_overlapping` those dropped by `without`.
    """

    prompts: tuple[Prompt, ...]
    num_skipped: int = 0
    num_overlapping: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    @property
    def fingerprint(self) -> int:
        """CRC-32 of the prompt texts in order: a changed dataset does not pass for the old one on resume."""
        crc = 0
        for prompt in self.prompts:
            crc = zlib.crc32(prompt.text.encode(errors="surrogatepass") + b"\0", crc)
        return crc

    def without(self, other: PromptDataset) -> PromptDataset:
        """These prompts less those whose text is in `other`, renumbered: evaluation data without the training data.

        Raises:
            ConfigError: nothing would be left.
        """
        seen = {prompt.text for prompt in other.prompts}
        kept = [prompt for prompt in self.prompts if prompt.text not in seen]
        if not kept:
            raise ConfigError(
                f"all {len(self)} evaluation prompts are in the training data too; change eval.data.seed, "
                "eval.data.split or eval.data.path"
            )
        return PromptDataset(_renumber(kept), self.num_skipped, self.num_overlapping + len(self) - len(kept))


class PromptCursor:
    """Walks a dataset epoch after epoch, each in its own permutation drawn from `seed` if `shuffle` is set."""

    def __init__(self, dataset: PromptDataset, *, seed: int, shuffle: bool = True) -> None:
        self.epoch = 0
        self.position = 0
        self._dataset = dataset
        self._identity = {"seed": seed, "shuffle": shuffle, "fingerprint": dataset.fingerprint}
        self._order = self._epoch_order()

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts; past the end of an epoch it goes on with the next one."""
        drawn: list[Prompt] = []
        while len(drawn) < n:
            if self.position == len(self._order):
                self.epoch += 1
                self.position = 0
                self._order = self._epoch_order()
            stop = min(len(self._order), self.position + n - len(drawn))
            drawn += [self._dataset[i] for i in self._order[self.position : stop]]
            self.position = stop
        return drawn

    def state(self) -> dict[str, Any]:
        """Plain JSON; `load_state` on an equal dataset, seed and shuffle continues exactly here."""
        return {"epoch": self.epoch, "position": self.position, **self._identity}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            ConfigError: the state belongs to other data, or to another order of it.
        """
        changed = [key for key, value in self._identity.items() if state[key] != value]
        if changed:
            keys = {"seed": "run.seed", "shuffle": "data.shuffle", "fingerprint": "the prompts themselves"}
            raise ConfigError(
                f"the checkpoint's place in the data does not fit this run: {', '.join(keys[key] for key in changed)} "
                "changed; restore the data section it was written with, or start a new run"
            )
        self.epoch = state["epoch"]
        self.position = state["position"]
        self._order = self._epoch_order()

    def _epoch_order(self) -> list[int]:
        order = list(range(len(self._dataset)))
        if self._identity["shuffle"]:
            # Python's own generator: its shuffle is the same on every platform and in every release so far.
            random.Random(f"{self._identity['seed']}/{self.epoch}").shuffle(order)
        return order


def load_prompts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reward_kind: RewardKind = "math",
    seed_offset: int = 0,
) -> PromptDataset:
    """Reads, renders and tokenizes the configured records.

    `reward_kind` is `reward.kind`: it decides what `Prompt.verifier` holds. `seed_offset` is added to `config.seed`
    and gives a reasoning-gym task other problems; the other sources are files and ignore it.

    Raises:
        ConfigError: naming the key, and the record or `file:line`, at fault; also when no prompt is left.
    """
    if config.template == "chat" and not tokenizer.chat_template:
        raise ConfigError("data.template chat: the tokenizer has no chat template; use data.template=raw")
    records = list(read_records(config, seed_offset))
    if not records:
        raise ConfigError(f"data.source {config.source}: {config.path or config.name} holds no records")
    return make_prompts(config, tokenizer, records, reward_kind=reward_kind)


def make_prompts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    reward_kind: RewardKind = "math",
) -> PromptDataset:
    """What `load_prompts` does after reading: renders and tokenizes `records`.

    Raises:
        ConfigError: naming the key and the record at fault; also when no prompt is left.
    """
    texts = [_render_prompt(config, tokenizer, record, i) for i, record in enumerate(records)]
    token_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    prompts = []
    for i, (record, text, ids) in enumerate(zip(records, texts, token_ids, strict=True)):
        if not _fits(config, i, len(ids)):
            continue
        prompts.append(
            Prompt(
                index=i,
                text=text,
                token_ids=tuple(ids),
                verifier=_verifier(config, reward_kind, record, i),
                solution=_fill("solution_template", config.solution_template, record, i, config),
            )
        )
    if not prompts:
        raise ConfigError(
            f"data.max_prompt_tokens {config.max_prompt_tokens} skips all {len(records)} prompts; raise it"
        )
    return PromptDataset(_renumber(prompts), num_skipped=len(records) - len(prompts))


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuses a tokenizer that can produce ids the model (`vocab_size` rows in its embedding) does not have.

    Raises:
        ConfigError: the tokenizer's largest id is `vocab_size` or above.
    """
    token, largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if largest >= vocab_size:
        raise ConfigError(
            f"model.hf_path: the tokenizer gives token {token!r} the id {largest}, but the model's vocabulary ends at "
            f"{vocab_size - 1}; use the tokenizer the model was trained with"
        )


def _renumber(prompts: Iterable[Prompt]) -> tuple[Prompt, ...]:
    return tuple(replace(prompt, index=i) for i, prompt in enumerate(prompts))


def _render_prompt(config: DataConfig, tokenizer: PreTrainedTokenizerBase, record: Record, index: int) -> str:
    if config.template == "raw":
        return _fill("raw_template", config.raw_template, record, index, config)
    messages = [{"role": "user", "content": str(_required(config, "prompt_key", record, index))}]
    if config.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": config.system_prompt})
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str)
    return text


def _fields(record: Record) -> dict[str, Any]:
    """What a template may name: the record's keys and, where it has reasoning-gym's form, those of its metadata."""
    metadata = record.get("metadata")
    fields = {**metadata, **record} if isinstance(metadata, dict) else record
    return {key: _plain(value) for key, value in fields.items() if key != "metadata"}


def _plain(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


def _fill(key: str, template: str | None, record: Record, index: int, config: DataConfig) -> Any:
    if template is None:
        return None
    fields = _fields(record)
    try:
        return template.format(**fields)
    except KeyError as error:
        raise ConfigError(
            f"data.{key} names {error}, which record {index} lacks; available: {', '.join(sorted(fields))}"
        ) from None
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(
            f"data.{key} {template!r} cannot be filled from record {index}: {error}; write a literal brace as '{{{{' "
            f"or '}}}}'"
        ) from None


def _required(config: DataConfig, key: str, record: Record, index: int) -> Any:
    name = getattr(config, key)
    if record.get(name) in (None, ""):
        state = "empty" if name in record else "missing"
        raise ConfigError(f"data.{key} {name!r} is {state} in record {index}; available: {', '.join(sorted(record))}")
    return record[name]


def _verifier(config: DataConfig, reward_kind: RewardKind, record: Record, index: int) -> dict[str, Any]:
    if reward_kind == "reasoning_gym":
        metadata = record.get("metadata")
        named = metadata.get("source_dataset") if isinstance(metadata, dict) else None
        task = config.name if config.source == "reasoning_gym" else named
        if not task:
            raise ConfigError(
                f"reward.kind reasoning_gym: record {index} has no metadata.source_dataset, the task that can score it; "
                "use entries made by reasoning-gym, or reward.kind=math"
            )
        return {"task": task, "entry": record}
    return {"answer": str(_required(config, "answer_key", record, index))}


def _fits(config: DataConfig, index: int, num_tokens: int) -> bool:
    if num_tokens == 0:
        raise ConfigError(f"record {index} makes a prompt of no tokens; check data.template and the tokenizer")
    if num_tokens <= config.max_prompt_tokens:
        return True
    if config.on_long_prompt == "skip":
        return False
    raise ConfigError(
        f"prompt {index} has {num_tokens} tokens, above data.max_prompt_tokens {config.max_prompt_tokens}; raise it or "
        "set data.on_long_prompt=skip"
    )
