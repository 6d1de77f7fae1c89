"""The sections that say where prompts come from and how they become text, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from megatron_reheat.config_fields import (
    MAX_SAMPLES,
    MAX_SEED,
    NO_NULL,
    Name,
    Options,
    Section,
    check_temperature,
    checked_path,
    inherited,
)

# of all parts of a mix alike: a batch has one kind of prompt, of one longest length, in one order
OF_THE_WHOLE_MIX = ("template", "max_prompt_tokens", "max_hinted_prompt_tokens", "shuffle")
# what data sets that share a section's other keys do not share
PLACE = ("name", "path", "split", "options", "size", "seed")


class DataConfig(Section):
    """One data set."""

    source: Literal["files", "reasoning_gym", "datasets", "jsonl"] = Field(
        default="files",
        description="jsonl: files whatever they are called, where their name does not tell another kind",
    )
    name: str | None = Field(default=None, description="reasoning-gym task, or dataset name for `datasets`")
    path: Annotated[str | tuple[str, ...] | None, BeforeValidator(checked_path)] = Field(
        default=None, description=".jsonl, .json, .csv (also .gz) or .parquet: one or a list; or a `datasets` folder"
    )
    split: str = Field(default="train", description="of a hub dataset or a folder; a file is read whole")
    options: Options = Field(default_factory=dict, description="passed to the reasoning-gym task, or to load_dataset")
    size: int | None = Field(
        default=None, gt=0, le=10**8, description="keep this many records; duplicates left out do not count"
    )
    deduplicate: bool = Field(default=False, description="keep the first of records that make the same prompt")
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="of the problems that a reasoning-gym task makes")
    shuffle: bool = Field(default=True, description="in a new order each time round; false: as the data has them")
    template: Literal["raw", "chat"] = Field(
        default="raw",
        description="raw: raw_template filled with the record's fields; chat: the tokenizer's chat template",
    )
    raw_template: str = Field(
        default="{question}", description="of the prompt's text; `{field}` stands for a field of the record"
    )
    chat_template_kwargs: Options = Field(
        default_factory=dict, description="for the chat template, e.g. {enable_thinking: false}"
    )
    add_special_tokens: bool | Literal["auto"] = Field(
        default="auto",
        description="begin with what the tokenizer puts before a text (a BOS) unless the template does; auto: if raw",
    )
    solution_template: str | None = Field(default=None, description="worked answer for the sft warm start")
    hint_template: str | None = Field(
        default=None,
        description="prompt of a teacher that knows more, in the place of the prompt's own text (which is `{prompt}`)",
    )
    system_prompt: str | None = Field(default=None, description="chat: goes before the prompt's messages")
    prompt_key: str = Field(
        default="question", description="chat: field with the text or the list of messages; may be dotted"
    )
    answer_key: str = Field(default="answer", description="field with the reference answer; may be dotted")
    max_prompt_tokens: int = Field(default=2048, gt=0, description="longest prompt, tokens")
    max_hinted_prompt_tokens: int = Field(default=8192, gt=0, description="of the prompt that hint_template makes")
    on_long_prompt: Literal["error", "skip"] = Field(
        default="error", description="of a longer one: error, or skip and count it"
    )

    @model_validator(mode="after")
    def _source_is_complete(self) -> DataConfig:
        self._check_source()
        return self

    def _check_source(self) -> None:
        if self.source == "reasoning_gym" and not self.name:
            raise ValueError("source reasoning_gym needs `name`, the task (e.g. countdown)")
        if self.source in ("files", "jsonl") and not self.path:
            raise ValueError(f"source {self.source} needs `path`: a .jsonl, .json, .csv or .parquet file, or several")
        if self.source == "datasets" and not (self.name or self.path):
            raise ValueError("source datasets needs `name` (hub) or `path` (files or a folder)")


class DataPart(DataConfig):
    """One of the data sets of a mix, with the keys of `data`; one that is left out is as in `data`."""

    weight: float | None = Field(
        default=None,
        gt=0,
        description="share of the prompts, relative to the other parts'; empty in all: each as many as it has",
    )


class TrainDataConfig(DataConfig):
    """Where prompts come from and how they become text.

    `template: raw` fills `raw_template` with the record's fields; `chat` goes through the tokenizer's chat template, with
    the text or the list of messages (`role`, `content`) under `prompt_key`. Keys may be dotted: `reward_model.ground_truth`.

    An epoch of a `mix` draws as many prompts as there are, each part's share of them by its weight; a part goes on in the next
    epoch where it stopped.
    """

    mix: Annotated[dict[Name, DataPart], NO_NULL] = Field(
        default_factory=dict,
        description="several data sets, by names of yours, under which their accuracy is logged: each with the keys of `data`, "
        "which hold for all where a part does not give them, and a `weight`",
    )

    @model_validator(mode="before")
    @classmethod
    def _parts_inherit(cls, section: Any) -> Any:
        return inherited(section, section, "mix")

    @model_validator(mode="after")
    def _parts_fit_together(self) -> TrainDataConfig:
        for name, part in self.mix.items():
            if differs := [key for key in OF_THE_WHOLE_MIX if getattr(part, key) != getattr(self, key)]:
                raise ValueError(f"mix.{name}.{differs[0]}: is the same for all parts; set it in data, outside the mix")
        weighted = {name: part.weight is not None for name, part in self.mix.items()}
        if len(set(weighted.values())) > 1:
            missing = next(name for name, has in weighted.items() if not has)
            raise ValueError(f"mix.{missing}: has no weight, and others have; give each part one, or none")
        return self

    def _check_source(self) -> None:
        if not self.mix:
            super()._check_source()
        elif self.path or self.name:
            raise ValueError("`path` and `name` beside `mix` would not be read; move them into one of its parts")

    @property
    def parts(self) -> Mapping[str, DataConfig]:
        """The data sets by their names in the mix; where there is none, `data` itself under no name."""
        return self.mix or {"": self}


class EvalSuite(DataConfig):
    """Held-out prompts with a name; a key that is left out is as in `eval.data`, but for where the prompts are."""

    num_samples: int | None = Field(
        default=None, gt=0, le=MAX_SAMPLES, description="of each prompt (k); empty: eval.num_samples"
    )


class EvalConfig(Section):
    """avg@k and pass@k on held-out prompts, sampled by the run's own engines."""

    data: DataConfig | None = Field(
        default=None, description="held-out prompts, with the keys of `data`; empty: no evaluation"
    )
    suites: Annotated[dict[Name, EvalSuite], NO_NULL] = Field(
        default_factory=dict,
        description="more held-out prompts by names of yours, logged as eval/NAME/...: each with the keys of `data` and its "
        "own num_samples; a key that is left out is as in eval.data, but for where the prompts are",
    )
    every: int = Field(default=0, ge=0, description="RL steps between evaluations; 0 evaluates at stage borders only")
    num_samples: int = Field(default=8, gt=0, le=MAX_SAMPLES, description="of each prompt (k)")
    temperature: float = Field(default=1.0, description="0 is greedy")
    top_p: float = Field(
        default=0.7, gt=0, le=1, description="nucleus of the evaluation's sampling; the paper's protocol is 0.7"
    )
    max_tokens: int = Field(default=8192, gt=0, description="longest response, tokens")

    @model_validator(mode="before")
    @classmethod
    def _suites_inherit(cls, section: Any) -> Any:
        given = section.get("data") if isinstance(section, Mapping) else None
        return inherited(section, given, "suites", without=PLACE)

    @property
    def sets(self) -> dict[str, DataConfig]:
        """What is evaluated on, by its name in metrics: `eval.data` under no name, then the suites."""
        return {**({} if self.data is None else {"": self.data}), **self.suites}

    def samples_of(self, name: str) -> int:
        """k of one of the `sets`."""
        suite = self.suites.get(name)
        return self.num_samples if suite is None or suite.num_samples is None else suite.num_samples

    @field_validator("temperature")
    @classmethod
    def _is_greedy_or_possible(cls, temperature: float) -> float:
        return temperature if temperature == 0 else check_temperature(temperature)


def data_place(part: str) -> str:
    """What a part of the mix is called in errors."""
    return f"data.mix.{part}" if part else "data"


def eval_place(suite: str) -> str:
    """What one of `EvalConfig.sets` is called in errors."""
    return f"eval.suites.{suite}" if suite else "eval.data"
