"""The policy as its own teacher, behind a prompt that knows more: what RLRT, RLSD and SDPG have in common."""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from pydantic import Field

from megatron_reheat.config import Config
from megatron_reheat.config_data import data_place
from megatron_reheat.config_fields import Section
from megatron_reheat.errors import ConfigError
from megatron_reheat.methods.grpo import GRPO, Tools
from megatron_reheat.types import At, Group, HintSource, TokenArray, TrainBatch, TrainSequence


class Privileged(GRPO):
    """Its sequences have `privileged_token_ids`, the teacher's prompt (`data.hint_template`).

    `hint: sibling` shows a correct response to the same prompt: the first of the group that is not the sample itself, and
    whose prompt is within `data.max_hinted_prompt_tokens`. Where there is none, the ids are None: teacher and student are the
    same then.
    """

    class Options(Section):
        """What the teacher is shown."""

        hint: HintSource = Field(
            default="sibling",
            description="`{solution}` of data.hint_template. sibling: a correct response of the group; record: its field",
        )

    options: Options

    def __init__(self, config: Config, options: Any, tools: Tools) -> None:
        super().__init__(config, options, tools)
        longest, limit = _longest(config), tools.hf.max_position_embeddings
        if longest > limit:
            raise ConfigError(
                f"data.max_hinted_prompt_tokens + rollout.max_tokens = {longest} tokens exceeds the model's context "
                f"(max_position_embeddings), {limit}; lower one of them"
            )

    @classmethod
    def problems(cls, config: Config, options: Any) -> Iterator[str]:
        for name, part in config.data.parts.items():
            key, template = f"{data_place(name)}.hint_template", part.hint_template
            if template is None:
                yield (
                    f"rl.method {config.rl.method} shows its teacher more than the policy sees: give {key} (e.g. '{{prompt}} "
                    "A correct solution: {solution} Now solve it in your own words.')"
                )
            elif options.hint == "sibling" and not _names_solution(template):
                yield (
                    f"rl.options.hint sibling puts a correct response where {key} has {{solution}}, and it has none; write it "
                    "there, or set rl.options.hint=record"
                )
        longest, limit = _longest(config), config.parallel.microbatch_tokens
        if longest > limit:
            yield (
                f"data.max_hinted_prompt_tokens {config.data.max_hinted_prompt_tokens} + rollout.max_tokens "
                f"{config.rollout.max_tokens} exceeds parallel.microbatch_tokens {limit}; the teacher reads that as one "
                f"sequence: raise parallel.microbatch_tokens to {longest}, or lower data.max_hinted_prompt_tokens"
            )

    @classmethod
    def hint(cls, options: Any) -> HintSource | None:
        return options.hint

    def sequences(self, group: Group, at: At) -> list[TrainSequence]:
        sequences, hinted = super().sequences(group, at), self._hinted_prompts(group)
        return [replace(s, privileged_token_ids=ids) for s, ids in zip(sequences, hinted, strict=True)]

    def _hinted_prompts(self, group: Group) -> list[TokenArray | None]:
        """The teacher's prompt for each of the group's samples."""
        hinted_prompt = self.tools.hinted_prompt
        if self.options.hint == "record":
            return [hinted_prompt(group.prompt, None)] * len(group.completions)
        successes = (i for i, reward in enumerate(group.rewards) if reward.correct)
        showing = (
            (i, hinted_prompt(group.prompt, self.tools.decode(group.completions[i].token_ids))) for i in successes
        )
        # that of the first success, and for this one itself that of the second
        shown = list(islice(((i, ids) for i, ids in showing if ids is not None), 2))
        return [next((ids for j, ids in shown if j != i), None) for i in range(len(group.completions))]


def teacher_view(batch: TrainBatch) -> TrainBatch:
    """The same responses, in the same order, behind the teacher's prompts."""
    hinted = [s if s.privileged_token_ids is None else s.behind(s.privileged_token_ids) for s in batch.sequences]
    return TrainBatch(tuple(hinted))


def _longest(config: Config) -> int:
    """Tokens of a sequence as the teacher reads it, at most."""
    return config.data.max_hinted_prompt_tokens + config.rollout.max_tokens


def _names_solution(template: str) -> bool:
    try:
        return any(name == "solution" for _, name, _, _ in string.Formatter().parse(template))
    except ValueError:
        return True  # not a template: the data's check says why
