"""Records become prompts (templates, tokens, length limits, verifiers), drawn in a resumable order.

Everything here is a function of the configuration and of the run's date, so that every rank holds the same prompts in the same
order.
"""

from __future__ import annotations

import array
from collections.abc import Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any

from megatron_reheat.config_data import DataConfig
from megatron_reheat.data.dataset import PromptDataset, RenderedPrompts
from megatron_reheat.data.records import Listed, Record, Records
from megatron_reheat.data.rendering import Renderer, RewardKind
from megatron_reheat.data.sources import read_records
from megatron_reheat.data.survey import Survey
from megatron_reheat.errors import ConfigError
from megatron_reheat.types import HintSource, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptCursor:
    """Walks a dataset epoch after epoch, each in its own order drawn from `seed` if `shuffle` is set."""

    def __init__(self, dataset: PromptDataset, *, seed: int, shuffle: bool = True) -> None:
        self.epoch = 0
        self.position = 0
        self.dataset = dataset
        self._identity = {"seed": seed, "shuffle": shuffle, "fingerprint": dataset.fingerprint}
        self._order: array.array[int] | None = None

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts; past the end of an epoch it goes on with the next one."""
        drawn: list[Prompt] = []
        while len(drawn) < n:
            if self.position == self.dataset.epoch_length(self.epoch):
                self.epoch += 1
                self.position = 0
                self._order = None
            if self._order is None:
                seed, shuffle = self._identity["seed"], bool(self._identity["shuffle"])
                self._order = self.dataset.epoch_order(str(seed), self.epoch, shuffle=shuffle)
            stop = min(len(self._order), self.position + n - len(drawn))
            drawn += self.dataset.take(self._order[self.position : stop])
            self.position = stop
        return drawn

    def state(self) -> dict[str, Any]:
        """Plain JSON; `load_state` on an equal dataset, seed and shuffle continues exactly here."""
        return {"epoch": self.epoch, "position": self.position, **self._identity}

    def problem_of(self, state: Mapping[str, Any]) -> str | None:
        """Why `state` is no place in any data; None where it is one."""
        counts = [state.get(key) for key in ("epoch", "position")]
        if state.keys() != self.state().keys() or not all(isinstance(count, int) and count >= 0 for count in counts):
            return f"its place in the data is {dict(state)}, and this version reads {', '.join(self.state())}"
        if state["fingerprint"] == self._identity["fingerprint"]:
            length = self.dataset.epoch_length(state["epoch"])
            if state["position"] > length:
                return f"its place in the data is prompt {state['position']} of {length}"
        return None

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken, which is a place in some data (`problem_of`).

        Raises:
            ConfigError: the state belongs to other data, or to another order of it.
        """
        changed = [key for key, value in self._identity.items() if state[key] != value]
        if changed:
            keys = {"seed": "run.seed", "shuffle": "data.shuffle", "fingerprint": self.dataset.identified_by}
            raise ConfigError(
                f"the checkpoint's place in the data does not fit this run: {', '.join(keys[key] for key in changed)} "
                "changed; restore the data section it was written with, or start a new run"
            )
        self.epoch = state["epoch"]
        self.position = state["position"]
        self._order = None


def load_prompts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reward_kind: RewardKind = "math",
    seed_offset: int = 0,
    section: str = "data",
    today: date | None = None,
    solved_limit: tuple[int, str] | None = None,
    hint: HintSource | None = None,
) -> RenderedPrompts:
    """Reads, renders and measures the configured records.

    `reward_kind` is `reward.kind`: it decides what `Prompt.verifier` holds. `seed_offset` is added to `config.seed`
    and gives a reasoning-gym task other problems; the other sources are files and ignore it. `section` is the recipe's,
    for errors. `today` is the date that chat templates may print, by default this day's. `solved_limit` is how many tokens
    a prompt and its worked answer may have, and the name of what limits them. `hint` is what a teacher is shown through
    `hint_template`; None if there is no such teacher, and then that template is not looked at.

    Raises:
        ConfigError: naming the key, and the record or `file:line`, at fault; also when no prompt is left.
    """
    return make_prompts(
        config,
        tokenizer,
        read_records(config, seed_offset, section),
        reward_kind=reward_kind,
        section=section,
        today=today,
        solved_limit=solved_limit,
        hint=hint,
    )


def make_prompts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    records: Records | Sequence[Record],
    *,
    reward_kind: RewardKind = "math",
    section: str = "data",
    today: date | None = None,
    solved_limit: tuple[int, str] | None = None,
    hint: HintSource | None = None,
) -> RenderedPrompts:
    """What `load_prompts` does after reading.

    Raises:
        ConfigError: naming the key and the record at fault; also when no prompt is left.
    """
    renderer = Renderer(config, tokenizer, reward_kind=reward_kind, section=section, today=today or date.today())
    listed = records if isinstance(records, Records) else Listed(records)
    return Survey(renderer, listed, solved_limit, hint).prompts()


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
