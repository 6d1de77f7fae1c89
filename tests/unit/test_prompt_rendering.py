"""How a record becomes a prompt: messages, nested fields, chat templates and their errors, special tokens, the date."""

from __future__ import annotations

import datetime as dt
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megatron_reheat.config_data import DataConfig
from megatron_reheat.data.prompts import PromptDataset, load_prompts, make_prompts
from megatron_reheat.errors import ConfigError
from tests.character_tokenizer import CHAT_TEMPLATE, character_tokenizer

TOKENIZER = character_tokenizer()
BOS = "<bos> $A"
# verl's and DAPO-Math-17k's schema; the problems are ours
VERL = [
    {
        "data_source": "math_dapo",
        "prompt": [{"content": f"What is {n} + 1?", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(n + 1), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"id-{n}"},
    }
    for n in range(3)
]
VERL_KEYS = {"template": "chat", "prompt_key": "prompt", "answer_key": "reward_model.ground_truth"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(folder: Path, records: list[dict[str, Any]], name: str = "a.jsonl") -> str:
    path = folder / name
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def made(record: dict[str, Any] | None = None, tokenizer: Any = TOKENIZER, **settings: Any) -> PromptDataset:
    config = DataConfig(path="unread", **settings)
    return make_prompts(config, tokenizer, [record or {"question": "q", "answer": "1"}])


def refused(record: dict[str, Any] | None = None, tokenizer: Any = TOKENIZER, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        made(record, tokenizer, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- messages and nested fields ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_records_of_verl_and_dapo(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, VERL * 100, name)
    dataset = load_prompts(DataConfig(path=path, deduplicate=True, system_prompt="Be brief.", **VERL_KEYS), TOKENIZER)
    assert len(dataset) == 3 and dataset.num_duplicates == 297
    assert dataset[1].text == "[system]Be brief.<eos>[user]What is 1 + 1?<eos>[assistant]"
    assert dataset[1].token_ids.count(TOKENIZER.eos_token_id) == 2
    assert dataset[1].verifier == {"answer": "2"}
    raw = DataConfig(
        path=path, size=1, raw_template="{extra_info.index}: {prompt.0.content}", answer_key="reward_model.ground_truth",
        solution_template="It is {reward_model.ground_truth}.",
    )  # fmt: skip
    (prompt,) = load_prompts(raw, TOKENIZER)
    assert (prompt.text, prompt.solution) == ("id-0: What is 0 + 1?", "It is 1.")


def test_conversations_of_trl(tmp_path: Path) -> None:
    """Arrow gives each message the fields of all others, as nulls."""
    turns = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c", "name": "me"},
    ]  # fmt: skip
    path = write(tmp_path, [{"prompt": turns, "answer": "1"}], "a.parquet")
    template = CHAT_TEMPLATE.replace(
        "[{{ m.role }}]", "[{{ m.role }}{% if m.name is defined %} {{ m.name }}{% endif %}]"
    )
    tokenizer = character_tokenizer(template)
    (prompt,) = load_prompts(DataConfig(path=path, template="chat", prompt_key="prompt"), tokenizer)
    assert prompt.text == "[system]s<eos>[user]a<eos>[assistant]b<eos>[user me]c<eos>[assistant]"


def test_a_column_with_dots_in_its_name_comes_first() -> None:
    record = {"a.b": "column", "a": {"b": "nested"}, "answer": "1"}
    assert made(record, raw_template="{a.b}")[0].text == "column"
    assert made({"a": {"b": "nested"}, "answer": "1"}, raw_template="{a.b}")[0].text == "nested"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "data.prompt_key 'prompt' is null in record 0; available: answer.of, prompt"),
        ("", "data.prompt_key 'prompt' is empty in record 0; available: "),
        (" \n", "data.prompt_key 'prompt' is empty in record 0"),
        ([], "data.prompt_key 'prompt' is empty in record 0"),
        (5, "data.prompt_key 'prompt' of record 0 must be text or a list of messages with role and content, not 5"),
        (float("nan"), "must be text or a list of messages with role and content, not nan"),
        ({"role": "user", "content": "q"}, "must be text or a list of messages with role and content, not a dict"),
        (["q"], "message 0 under data.prompt_key 'prompt' of record 0 must have role and content, not be a str"),
        ([{"role": "user"}], "must have role and content, not be a dict"),
        ([{"role": "user", "content": None}], "must have text as its content, not null"),
        ([{"role": None, "content": "q"}], "must have text as its role, not null"),
        ([{"role": "user", "content": [{"type": "text", "text": "q"}]}], "must have text as its content, not a list"),
        ([{"role": "user", "content": " "}], "the last message under data.prompt_key 'prompt' of record 0 is empty"),
        (
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": "4"}],
            "data.prompt_key 'prompt' of record 0 ends with the assistant's message, which would give the answer away",
        ),
        ("x\ud800", r"the prompt of record 0 holds '\ud800', half of a UTF-16 pair"),
        ([{"role": "user", "content": "\udfff"}], r"the prompt of record 0 holds '\udfff', half of a UTF-16 pair"),
    ],
)
def test_prompts_that_are_none(prompt: Any, message: str) -> None:
    record = {"prompt": prompt, "answer": {"of": "1"}}
    assert message in refused(record, template="chat", prompt_key="prompt", answer_key="answer.of")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "data.raw_template names 'x', which is null in record 0; name text or numbers"),
        (float("nan"), "data.raw_template names 'x', which is nan in record 0"),
        (True, "data.raw_template names 'x', which holds a bool in record 0"),
        ({"a": 1}, "data.raw_template names 'x', which holds a dict in record 0"),
        ([{"role": "user", "content": "q"}], "data.raw_template names 'x', which holds a dict in record 0"),
        ([[1], [2]], "data.raw_template names 'x', which holds a list in record 0"),
        ([1, None], "data.raw_template names 'x', which is null in record 0"),
        ("\ud83d", r"the prompt of record 0 holds '\ud83d', half of a UTF-16 pair"),
    ],
)
def test_fields_that_are_no_text(value: Any, message: str) -> None:
    assert message in refused({"x": value, "answer": "1"}, raw_template="{x}")
    worked = refused({"question": "q", "x": value, "answer": "1"}, solution_template="{x}")
    assert message.replace("raw_template", "solution_template").replace("the prompt", "the worked answer") in worked


@pytest.mark.parametrize("key", ["reward_model.truth", "reward.ground_truth", "data_source.ground_truth", "prompt.5"])
def test_a_nested_field_that_is_not_there(key: str) -> None:
    there = "ability, data_source, extra_info.index, prompt, reward_model.ground_truth, reward_model.style"
    assert refused(VERL[0], **{**VERL_KEYS, "answer_key": key}) == (
        f"data.answer_key {key!r} is missing in record 0; available: {there}"
    )
    message = refused(VERL[0], raw_template=f"{{{key}}}")
    assert message == f"data.raw_template names {key!r}, which record 0 lacks; available: {there}"


def test_a_column_that_only_some_records_have(tmp_path: Path) -> None:
    path = write(tmp_path, [{"question": "q", "answer": "1"}, {"question": "q"}])
    with pytest.raises(
        ConfigError, match=r"'answer' is missing in record 1 of .*a\.jsonl \(line 2\); available: question"
    ):
        load_prompts(DataConfig(path=path), TOKENIZER)


# -- chat templates ------------------------------------------------------------------------------------------------------

ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate\n user/assistant') }}{% endif %}{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (ALTERNATING, "Conversation roles must alternate user/assistant"),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x", "System role"),
        ("{{ messages[0].tool.name }}", "has no attribute 'tool'"),
        ("{{ settings.depth }}", "'settings' is undefined"),
        ("{% for m in messages %}{{ m.content }}", "Unexpected end of template"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion|does not end within"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)  # fmt: skip
def test_a_template_that_fails_is_one_sentence(template: str, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path, [{"question": "q", "answer": "1"}])
    config = DataConfig(path=path, template="chat", system_prompt="s")
    tokenizer = character_tokenizer(template)
    tokenizer.name_or_path = "models/mine"
    with pytest.raises(ConfigError) as caught:
        load_prompts(config, tokenizer)
    start = f"data.template chat: the chat template of models/mine does not render record 0 of {path} (line 1) (roles: "
    assert str(caught.value).startswith(start + "system, user): ") and "\n" not in str(caught.value)
    assert re.search(reason, str(caught.value))


@pytest.mark.parametrize("templates", [None, "", {}])
def test_no_template_at_all(templates: Any) -> None:
    message = refused(tokenizer=character_tokenizer(templates), template="chat")
    assert "the tokenizer has no chat template" in message and message.endswith("use data.template=raw")


def test_several_templates() -> None:
    tokenizer = character_tokenizer({"rag": "r{{ messages[0].content }}", "tool_use": "t{{ messages[0].content }}"})
    message = refused(tokenizer=tokenizer, template="chat")
    assert message == (
        "data.template chat: the tokenizer has several chat templates and none is the default; name one (rag, tool_use) as "
        "data.chat_template_kwargs.chat_template"
    )
    chosen = {"template": "chat", "chat_template_kwargs": {"chat_template": "rag"}}
    assert made(tokenizer=tokenizer, **chosen)[0].text == "rq"
    chosen["chat_template_kwargs"] = {"chat_template": "rga"}
    assert "'rga' is not one of rag, tool_use, or a template's text" in refused(tokenizer=tokenizer, **chosen)
    with_default = character_tokenizer({"default": "d{{ messages[0].content }}", "rag": "r"})
    assert made(tokenizer=with_default, template="chat")[0].text == "dq"


def test_arguments_of_the_template() -> None:
    tokenizer = character_tokenizer(
        "{{ messages[0].content }}{% if enable_thinking is false %}<think></think>{% endif %}"
    )
    settings = {"template": "chat", "chat_template_kwargs": {"enable_thinking": False}}
    assert made(tokenizer=tokenizer, template="chat")[0].text == "q"
    assert made(tokenizer=tokenizer, **settings)[0].text == "q<think></think>"
    assert made(tokenizer=tokenizer, **settings).notes == []
    settings["chat_template_kwargs"] = {"enable_thinkin": False}
    assert made(tokenizer=tokenizer, **settings).notes == [
        "the chat template does not know 'enable_thinkin' of data.chat_template_kwargs"
    ]
    settings["chat_template_kwargs"] = {"tokenize": True, "messages": []}
    assert "data.chat_template_kwargs must not hold messages, tokenize" in refused(tokenizer=tokenizer, **settings)


def test_what_a_template_leaves_out_is_noted() -> None:
    deaf = character_tokenizer("{{ messages[-1].content }}")
    assert made(tokenizer=deaf, template="chat", system_prompt="s").notes == [
        "the chat template leaves data.system_prompt out or changes it"
    ]
    assert made(tokenizer=TOKENIZER, template="chat", system_prompt="s").notes == []
    ignored = made(system_prompt="s", chat_template_kwargs={"a": 1}).notes
    assert ignored == [
        f"data.{key} is for data.template=chat; the raw template leaves it out"
        for key in ("system_prompt", "chat_template_kwargs")
    ]


def test_two_system_prompts() -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    message = refused({"question": turns, "answer": "1"}, template="chat", system_prompt="t")
    assert message == "data.system_prompt is given, and record 0 begins with a system message; clear one of them"


# -- special tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adds", "settings", "begins"),
    [
        ("$A", {}, "q"),
        (BOS, {}, "<bos>q"),
        (BOS, {"raw_template": "<bos>{question}"}, "<bos>q"),
        (BOS, {"add_special_tokens": True, "raw_template": "<bos>{question}"}, "<bos>q"),
        (BOS, {"add_special_tokens": False}, "q"),
        ("<bos> $A <eos>", {}, "<bos>q"),
        ("$A <eos>", {}, "q"),
        ("<bos> <eos> $A", {"raw_template": "<bos><eos>{question}"}, "<bos><eos>q"),
        (BOS, {"template": "chat"}, "[user]q<eos>[assistant]"),
        (BOS, {"template": "chat", "add_special_tokens": True}, "<bos>[user]q<eos>[assistant]"),
        ("$A", {"template": "chat", "add_special_tokens": True}, "[user]q<eos>[assistant]"),
    ],
)
def test_special_tokens_stand_at_the_start_once(adds: str, settings: dict[str, Any], begins: str) -> None:
    tokenizer = character_tokenizer(adds=adds)
    (prompt,) = made(tokenizer=tokenizer, **settings)
    assert tokenizer.decode(prompt.token_ids, skip_special_tokens=False).replace(" ", "") == begins
    assert made(tokenizer=tokenizer, max_prompt_tokens=len(prompt.token_ids), **settings).longest == len(
        prompt.token_ids
    )


def test_a_chat_template_that_writes_its_own_bos() -> None:
    tokenizer = character_tokenizer("{{ bos_token }}" + CHAT_TEMPLATE, adds=BOS)
    for wanted in ("auto", True):
        dataset = made(tokenizer=tokenizer, template="chat", add_special_tokens=wanted)
        assert dataset[0].token_ids.count(tokenizer.bos_token_id) == 1 and not dataset.notes
    assert made(tokenizer=character_tokenizer(adds=BOS), template="chat").notes == [
        "the chat template writes no <bos>; data.add_special_tokens=true would add it"
    ]


def test_a_prompt_is_as_long_as_the_engine_sees_it() -> None:
    message = refused({"question": "qq", "answer": "1"}, character_tokenizer(adds=BOS), max_prompt_tokens=2)
    assert message.startswith("the prompt of record 0 has 3 tokens, above data.max_prompt_tokens 2")


def test_text_that_the_tokenizer_does_not_read_is_named(tmp_path: Path) -> None:
    characters = Tokenizer(models.WordLevel({"q": 0, "<eos>": 1}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<eos>")
    path = write(tmp_path, [{"question": text, "answer": "1"} for text in ("q", "q", "z")])
    with pytest.raises(
        ConfigError, match=r"the tokenizer does not read the prompt of record 2 of .*a\.jsonl \(line 3\)"
    ):
        load_prompts(DataConfig(path=path), tokenizer)


# -- the date ------------------------------------------------------------------------------------------------------------

DATED = (
    "{% macro today() %}{{ strftime_now('%d %b %Y %H:%M') }}{% endmacro %}"
    "{% if strftime_now is defined %}Today: {{ today() }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
)


def test_a_template_that_prints_the_date_prints_that_of_the_run() -> None:
    tokenizer = character_tokenizer(DATED)
    config = DataConfig(path="unread", template="chat")
    records = [{"question": "q", "answer": "1"}]
    day, next_day = (make_prompts(config, tokenizer, records, today=dt.date(2024, 2, number)) for number in (28, 29))
    assert day[0].text == "Today: 28 Feb 2024 00:00q" and next_day[0].text == "Today: 29 Feb 2024 00:00q"
    assert day.notes == ["the chat template prints the date, 2024-02-28 in all prompts of this run"]
    assert day.fingerprint != next_day.fingerprint
    assert day.fingerprint == make_prompts(config, tokenizer, records, today=dt.date(2024, 2, 28)).fingerprint


# -- worked answers ------------------------------------------------------------------------------------------------------


def test_a_worked_answer_that_is_too_long(tmp_path: Path) -> None:
    path = write(tmp_path, [{"question": "q" * n, "answer": "a" * n} for n in (1, 2, 3)])
    config = DataConfig(path=path, solution_template="{answer}.")
    assert len(load_prompts(config, TOKENIZER, solved_limit=(8, "x"))) == 3  # 3 + 4 + the end
    with pytest.raises(ConfigError) as caught:
        load_prompts(config, TOKENIZER, solved_limit=(7, "parallel.microbatch_tokens"))
    assert str(caught.value) == (
        f"prompt and worked answer (data.solution_template) of record 2 of {path} (line 3) have 8 tokens, above "
        "parallel.microbatch_tokens 7; raise that or leave the record out"
    )
    skipping = DataConfig(path=path, solution_template="{answer}.", max_prompt_tokens=2, on_long_prompt="skip")
    assert len(load_prompts(skipping, TOKENIZER, solved_limit=(7, "x"))) == 2


# -- the prompts of a teacher that knows more ----------------------------------------------------------------------------


def text_of(ids: tuple[int, ...] | None) -> str:
    assert ids is not None
    return TOKENIZER.decode(ids)


def hinted(record: dict[str, Any], solution: str | None = None, tokenizer: Any = TOKENIZER, **settings: Any) -> str:
    config = DataConfig(path="unread", **settings)
    made = make_prompts(config, tokenizer, [record], hint="record" if solution is None else "sibling")
    return text_of(made.hinted(0, solution))


def test_a_hint_stands_where_the_prompts_text_does() -> None:
    record = {"question": "q", "answer": "1", "solution": "s", "steps": ["a", "b"]}
    template = "{prompt} Hint: {solution} ({answer}). {question}"
    assert hinted(record, raw_template="Q: {question}", hint_template=template) == "Q: q Hint: s (1). q"
    assert hinted(record, "{mine}", raw_template="Q: {question}", hint_template=template) == "Q: q Hint: {mine} (1). q"
    assert hinted(record, hint_template="{prompt} {steps}") == "q a,b"
    # nothing but the tokenizer's own tokens stands before either
    bos = character_tokenizer(adds=BOS)
    (prompt,) = make_prompts(DataConfig(path="unread"), bos, [record])
    assert hinted(record, "x", bos, hint_template="{prompt}{solution}") == "<bos>qx"
    assert prompt.token_ids[0] == bos.bos_token_id


def test_a_hint_in_a_chat_is_in_its_last_message() -> None:
    turns = [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "1 + 1?"},
    ]
    record = {"prompt": turns, "answer": "2"}
    settings = {"template": "chat", "prompt_key": "prompt", "system_prompt": "Be brief."}
    shown = hinted(record, "two", **settings, hint_template="{prompt} It is {solution}, says {answer}.")
    assert shown == (
        "[system]Be brief.<eos>[user]Hi.<eos>[assistant]Hello.<eos>[user]1 + 1? It is two, says 2.<eos>[assistant]"
    )
    assert record["prompt"] == turns and turns[-1]["content"] == "1 + 1?"


def test_hints_of_a_later_record_and_of_a_selection(tmp_path: Path) -> None:
    path = write(tmp_path, [{"question": "q" * n, "answer": str(n)} for n in (1, 3, 2)])
    config = DataConfig(path=path, hint_template="{prompt}={answer}", max_prompt_tokens=2, on_long_prompt="skip")
    prompts = load_prompts(config, TOKENIZER, hint="record")
    assert [text_of(prompts.hinted(p.index)) for p in prompts] == ["q=1", "qq=2"]
    other = load_prompts(DataConfig(path=path, size=1), TOKENIZER)
    assert text_of(prompts.without(other).hinted(0)) == "qq=2"


@pytest.mark.parametrize(
    ("template", "hint", "message"),
    [
        ("{prompt} {why}", "record", "data.hint_template names 'why', which record 0 lacks; available: answer"),
        ("{prompt} {solution}", "record", "data.hint_template names 'solution', which record 0 lacks; available: answer"),
        ("{prompt} {", "sibling", "data.hint_template '{prompt} {' cannot be filled from record 0: "),
        ("\N{SNOWMAN}{prompt}", "record", "data: the tokenizer does not read the hinted prompt of record 0: "),
    ],
)  # fmt: skip
def test_hints_are_checked_with_the_data(template: str, hint: Any, message: str) -> None:
    class Reader:
        """A tokenizer that refuses what it does not know, as one without an unknown token does."""

        def __getattr__(self, name: str) -> Any:
            return getattr(TOKENIZER, name)

        def __call__(self, texts: Any, **settings: Any) -> Any:
            if not all(text.isascii() for text in texts):
                raise Exception("WordLevel error: Missing [UNK] token")
            return TOKENIZER(texts, **settings)

    config = DataConfig(path="unread", hint_template=template, add_special_tokens=False)
    records = [{"question": "q", "answer": "1"}]
    with pytest.raises(ConfigError) as caught:
        make_prompts(config, Reader(), records, hint=hint)
    assert str(caught.value).startswith(message)
    assert len(make_prompts(config, TOKENIZER, records)) == 1  # nobody looks at it


def test_a_sibling_stands_in_for_a_field_that_the_records_lack() -> None:
    assert hinted({"question": "q", "answer": "1"}, "x", hint_template="{prompt}: {solution}") == "q: x"


def test_a_hint_that_is_too_long(tmp_path: Path) -> None:
    path = write(tmp_path, [{"question": "q", "answer": "a" * n} for n in (1, 2, 3)])
    config = DataConfig(path=path, hint_template="{prompt}{answer}", max_hinted_prompt_tokens=3)
    with pytest.raises(ConfigError) as caught:
        load_prompts(config, TOKENIZER, hint="record")
    assert str(caught.value) == (
        f"the hinted prompt (data.hint_template) of record 2 of {path} (line 3) has 4 tokens, above "
        "data.max_hinted_prompt_tokens 3; raise it, or set data.on_long_prompt=skip to train on that record without a hint"
    )
    skipping = load_prompts(config.model_copy(update={"on_long_prompt": "skip"}), TOKENIZER, hint="record")
    assert [skipping.hinted(i) is None for i in range(len(skipping))] == [False, False, True]
    assert "1 hints longer than data.max_hinted_prompt_tokens are not shown" in skipping.describe()
    with_sibling = load_prompts(
        config.model_copy(update={"hint_template": "{prompt}{solution}"}), TOKENIZER, hint="sibling"
    )
    assert with_sibling.hinted(0, "ab") is not None and with_sibling.hinted(0, "abc") is None
