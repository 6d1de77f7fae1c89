"""The evaluation suites: where each one's problems come from, which columns they are in, and how they become prompts.

A suite is read from the hub, or from `DATA_ROOT/<suite>/`: the `*.jsonl` files in it, else its `*.parquet` files, else its
`*.csv` files, with the hub's columns. reasoning-gym makes its own problems: `reasoning_gym:TASK`, or
`reasoning_gym:TASK:OPTIONS` with a YAML (or JSON) mapping of the task's options, `size` and `seed` among them.
"""

from __future__ import annotations

import difflib
import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_reheat import recipe_text
from megatron_reheat.config_data import DataConfig
from megatron_reheat.config_fields import MAX_SEED
from megatron_reheat.data.prompts import PromptDataset, RewardKind, make_prompts
from megatron_reheat.data.records import Listed, Record, Records
from megatron_reheat.data.references import reference_text
from megatron_reheat.data.sources import read_records
from megatron_reheat.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOXED = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
LETTER = "\n\nPlease reason step by step, and put the letter of the right option within \\boxed{}."
TAGGED = "\n\nPlease reason step by step, and put your final answer between <answer> and </answer>."
LETTERS = "ABCD"
GYM: Literal["reasoning_gym"] = "reasoning_gym"
# far from the small seeds of training recipes, so that no problem is met in both
GYM_SEED = 2026
# fixed: every model and every sampling seed meets the options of a question in the same order
OPTION_SEED = 0
PROMPT_KEY = "reheat_prompt"
# what the keys of a recipe are called here
OPTIONS = {
    "data.raw_template": "--template",
    "data.template": "--template",
    "data.path": "--data-root",
    "data.chat_template_kwargs": "--chat-template-kwargs",
}
LOCAL_KINDS = (".jsonl", ".parquet", ".csv")


@dataclass(frozen=True)
class Suite:
    """`wrong_keys` makes a multiple-choice suite: columns of the wrong options, `answer_key` being that of the right one."""

    hub_id: str
    split: str
    question_key: str
    answer_key: str
    license: str
    config: str | None = None
    suffix: str = BOXED
    wrong_keys: tuple[str, ...] = ()
    gated: bool = False


# Hub names and columns as public code that loads these datasets has them; the hub was out of reach where this was written,
# so only the columns of aime24 were seen on the dataset's own page. A column that is not there is an error by name.
SUITES = {
    "math500": Suite("HuggingFaceH4/MATH-500", "test", "problem", "answer", "MIT (that of MATH)"),
    "aime24": Suite("HuggingFaceH4/aime_2024", "train", "problem", "answer", "none stated; problems (c) MAA"),
    "aime25": Suite("math-ai/aime25", "test", "problem", "answer", "Apache-2.0; problems (c) MAA"),
    "aime26": Suite("MathArena/aime_2026", "train", "problem", "answer", "see its page; problems (c) MAA"),
    "amc23": Suite("math-ai/amc23", "test", "question", "answer", "see its page; problems (c) MAA"),
    "olymmath_en_easy": Suite("RUC-AIBOX/OlymMATH", "test", "problem", "answer", "MIT", config="en-easy"),
    "olymmath_en_hard": Suite("RUC-AIBOX/OlymMATH", "test", "problem", "answer", "MIT", config="en-hard"),
    # Its authors ask that the questions never appear in plain text on the web: keep samples-gpqa_diamond.jsonl private.
    "gpqa_diamond": Suite(
        "Idavidrein/gpqa",
        "train",
        "Question",
        "Correct Answer",
        "CC-BY-4.0, gated",
        config="gpqa_diamond",
        suffix=LETTER,
        wrong_keys=("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
        gated=True,
    ),
}


@dataclass(frozen=True)
class SuitePrompts:
    """A suite ready to be sampled; `source` says where its problems are from, `file_name` is its name as part of a file's."""

    name: str
    source: str
    reward_kind: RewardKind
    prompts: PromptDataset

    @property
    def file_name(self) -> str:
        """Letters, digits, `_`, `.` and `-` alone; whatever else stands between them is one `_`."""
        return re.sub(r"[^\w.-]+", "_", self.name).strip("_")

    @property
    def notes(self) -> list[str]:
        """Those of the prompts, in terms of the command's options."""
        return [_in_options(note) for note in self.prompts.notes]


def load_suites(
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    chat_template_kwargs: str = "",
    limit: int | None = None,
    data_root: Path | None = None,
) -> list[SuitePrompts]:
    """The first `limit` problems of each suite as prompts.

    `template` is `chat` (the tokenizer's chat template), `raw` (the question as it is), both with a sentence that asks for
    the form of answer that is graded; or a text of one's own with the record's fields in braces, and nothing added.
    `chat_template_kwargs` is a YAML mapping for the chat template (e.g. `{enable_thinking: false}`).

    Raises:
        ConfigError: naming the suite and the option, file, record or hub dataset at fault.
    """
    if template not in ("chat", "raw") and "{" not in template:
        raise ConfigError(
            f"--template {template!r} must be chat, raw, or a text with {{fields}} of the problem's record"
        )
    if template == "chat" and not tokenizer.chat_template:
        raise ConfigError("--template chat: the model's tokenizer has no chat template; use --template raw")
    kwargs = _mapping(chat_template_kwargs, "--chat-template-kwargs", "{enable_thinking: false}")
    if kwargs and template != "chat":
        raise ConfigError("--chat-template-kwargs needs --template chat")
    for name in names:
        if not name.startswith(f"{GYM}:") and name not in SUITES:
            raise ConfigError(_unknown(name))
    today = date.today()  # one for all suites
    suites = [_load(name, tokenizer, template, kwargs, today, limit, data_root) for name in names]
    files = [suite.file_name for suite in suites]
    if twice := [name for name, file in zip(names, files, strict=True) if files.count(file) > 1]:
        raise ConfigError(f"--suite {twice[0]} is named twice; name each suite once")
    return suites


def _load(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    kwargs: dict[str, Any],
    today: date,
    limit: int | None,
    data_root: Path | None,
) -> SuitePrompts:
    kind: RewardKind = "math" if name in SUITES else "reasoning_gym"
    try:
        records = _posed(name, limit, data_root) if name in SUITES else _gym_records(name, limit)
        prompts = make_prompts(_rendering(name, template, kwargs), tokenizer, records, reward_kind=kind, today=today)
    except ConfigError as error:
        raise ConfigError(f"suite {name}: {_in_options(' '.join(str(error).split()))}") from None
    return SuitePrompts(name, _source(name, data_root), kind, prompts)


def _in_options(text: str) -> str:
    for key, option in OPTIONS.items():
        text = text.replace(key, option)
    return text


def _rendering(name: str, template: str, kwargs: dict[str, Any]) -> DataConfig:
    """How records become text, in the words of the training data's configuration."""
    return DataConfig(
        source="datasets" if name in SUITES else GYM,
        name=name if name in SUITES else name.split(":")[1],
        template="chat" if template == "chat" else "raw",
        chat_template_kwargs=kwargs,
        raw_template=f"{{{PROMPT_KEY}}}" if template == "raw" else template,
        prompt_key=PROMPT_KEY,
        max_prompt_tokens=2**31,
    )


def _source(name: str, data_root: Path | None) -> str:
    if name not in SUITES:
        return "reasoning-gym"
    suite = SUITES[name]
    place = suite.hub_id if data_root is None else f"{data_root / name}, a copy of {suite.hub_id}"
    return f"{place}, config {suite.config or 'default'}, split {suite.split} (license: {suite.license})"


def _unknown(name: str) -> str:
    known = [*SUITES, f"{GYM}:TASK"]
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"unknown suite {name!r}; " + (f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}")


# -- hub datasets ----------------------------------------------------------------------------------------------------


def _posed(name: str, limit: int | None, data_root: Path | None) -> Listed:
    """A suite's records with the prompt and, under `answer`, what the grader compares with."""
    suite = SUITES[name]
    if data_root is not None:
        place, records = str(data_root / name), _local_records(data_root / name)
    else:
        place, records = suite.hub_id, _hub_records(name, suite)
    posed = [_pose(suite, record, i, place) for i, record in enumerate(itertools.islice(records, limit))]
    if not posed:
        raise ConfigError(f"{place} holds no problems")
    return Listed(posed, place)


def _pose(suite: Suite, record: Record, index: int, place: str) -> Record:
    for key in (suite.question_key, suite.answer_key, *suite.wrong_keys):
        if record.get(key) in (None, ""):
            state = "empty" if key in record else "missing"
            columns = ", ".join(map(repr, record))
            raise ConfigError(f"column {key!r} is {state} in record {index} of {place}; its columns are {columns}")
    question = str(record[suite.question_key])
    answer = reference_text(record[suite.answer_key], f"column {suite.answer_key!r} in record {index} of {place}")
    if suite.wrong_keys:
        options = [answer, *(str(record[key]) for key in suite.wrong_keys)]
        order = list(range(len(options)))
        random.Random(f"{OPTION_SEED}/{index}").shuffle(order)
        listed = (f"{letter}) {options[i].strip()}" for letter, i in zip(LETTERS, order, strict=True))
        question, answer = "\n".join([question.strip() + "\n", *listed]), LETTERS[order.index(0)]
    return {**record, PROMPT_KEY: question + suite.suffix, "answer": answer}


def _hub_records(name: str, suite: Suite) -> Records:
    options = {"name": suite.config} if suite.config else {}
    try:
        return read_records(DataConfig(source="datasets", name=suite.hub_id, split=suite.split, options=options))
    except ConfigError as error:
        access = "check the network and HF_HUB_OFFLINE"
        if suite.gated:
            page = f"https://huggingface.co/datasets/{suite.hub_id}"
            access = f"it is gated: accept its terms at {page} and log in (`hf auth login`)"
        raise ConfigError(f"{error}; {access}, or put its files into DATA_ROOT/{name}/ and pass --data-root") from None


def _local_records(folder: Path) -> Records:
    files = next((found for kind in LOCAL_KINDS if (found := sorted(folder.glob(f"*{kind}")))), [])
    if not files:
        state = f"has no file of {', '.join(LOCAL_KINDS)}" if folder.is_dir() else "does not exist"
        raise ConfigError(f"--data-root: {folder} {state}")
    return read_records(DataConfig(path=tuple(map(str, files))))


# -- reasoning-gym ---------------------------------------------------------------------------------------------------


def _gym_records(name: str, limit: int | None) -> Listed:
    """Entries as the task made them, which its scorer needs, with the prompt beside."""
    _, task, *rest = name.split(":", 2)
    options = _mapping(rest[0] if rest else "", "options", f"{GYM}:countdown:'{{min_numbers: 3}}'")
    seed, size = options.pop("seed", GYM_SEED), options.pop("size", None)
    sizes = [s for s in (size, limit) if s is not None]
    try:
        source = DataConfig(source=GYM, name=task, options=options, seed=seed, size=min(sizes, default=None))
    except (TypeError, ValueError):
        raise ConfigError(
            f"{GYM} needs a task, and whole numbers for size and seed (size from 1, seed from 0 to {MAX_SEED}), as in "
            f"{GYM}:countdown"
        ) from None
    return Listed([{**entry, PROMPT_KEY: str(entry["question"]) + TAGGED} for entry in read_records(source)])


def _mapping(text: str, what: str, example: str) -> dict[str, Any]:
    try:
        options = recipe_text.read_value(text, dict[str, Any]) if text else {}
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ConfigError(f"{what} {text!r} are not a YAML mapping; write {example}")
    return options
