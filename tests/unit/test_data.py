"""Sources, templates, limits, and a cursor that resumes exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from megatron_reheat.config_data import DataConfig
from megatron_reheat.data.prompts import PromptCursor, PromptDataset, check_vocabulary, load_prompts
from megatron_reheat.errors import ConfigError
from megatron_reheat.types import Prompt
from tests.character_tokenizer import character_tokenizer

COUNTDOWN = {"min_numbers": 3, "max_numbers": 3, "max_value": 9, "min_target": 1, "max_target": 50}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer()


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return str(path)


def countdown(**changes: Any) -> DataConfig:
    settings = {"source": "reasoning_gym", "name": "countdown", "options": COUNTDOWN, "size": 20}
    return DataConfig(**settings | {"raw_template": "{target}|{numbers}="} | changes)


def numbered(n: int) -> PromptDataset:
    return PromptDataset(tuple(Prompt(i, f"prompt {i}", (i,), {}) for i in range(n)))


def test_countdown_template_and_verifier(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = load_prompts(countdown(solution_template="{answer}"), tokenizer, reward_kind="reasoning_gym")
    assert len(dataset) == 20
    for i, prompt in enumerate(dataset):
        entry = prompt.verifier["entry"]
        metadata = entry["metadata"]
        assert prompt.index == i
        assert prompt.text == f"{metadata['target']}|{','.join(map(str, metadata['numbers']))}="
        assert prompt.token_ids == tuple(tokenizer.get_vocab()[c] for c in prompt.text)
        assert prompt.solution == entry["answer"]
        assert prompt.verifier["task"] == "countdown"


def test_countdown_is_deterministic_and_seeds_do_not_overlap(tokenizer: PreTrainedTokenizerFast) -> None:
    def texts(seed: int, seed_offset: int = 0) -> list[str]:
        dataset = load_prompts(
            countdown(seed=seed, size=8), tokenizer, reward_kind="reasoning_gym", seed_offset=seed_offset
        )
        return [prompt.text for prompt in dataset]

    assert texts(0) == texts(0)
    assert set(texts(0)).isdisjoint(texts(1))
    assert texts(0, seed_offset=1) == texts(1)


def test_without_removes_training_problems(tokenizer: PreTrainedTokenizerFast) -> None:
    train = load_prompts(countdown(size=40, options=COUNTDOWN | {"max_value": 3}), tokenizer)
    held_out = load_prompts(countdown(size=40, options=COUNTDOWN | {"max_value": 3}, seed=1), tokenizer)
    shared = [prompt for prompt in held_out if prompt.text in {p.text for p in train}]
    assert 0 < len(shared) < 40
    clean = held_out.without(train)
    assert clean.num_overlapping == len(shared)
    assert len(clean) == 40 - len(shared)
    assert {p.text for p in clean}.isdisjoint(p.text for p in train)
    assert [p.index for p in clean] == list(range(len(clean)))
    with pytest.raises(ConfigError, match=r"all 40 evaluation prompts .* eval\.data\.seed"):
        train.without(train)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "count_down"}, r"data\.name: reasoning-gym has no task 'count_down'; did you mean 'countdown'"),
        ({"options": {"max_valeu": 9}}, r"data\.options does not fit .* 'max_valeu'"),
        ({"options": {"min_numbers": 1}}, r"min_numbers must be greater than 1"),
        ({"options": {"seed": 1}}, r"data\.options must not hold seed; use data\.seed"),
        ({"raw_template": "{goal}="}, r"data\.raw_template names 'goal', which record 0 lacks; .*numbers, .*target"),
        ({"raw_template": "{target"}, r"data\.raw_template .* cannot be filled from record 0"),
        ({"raw_template": "{}"}, r"data\.raw_template .* cannot be filled from record 0"),
        ({"raw_template": ""}, r"record 0 makes a prompt of no tokens"),
        ({"solution_template": "{steps}"}, r"data\.solution_template names 'steps'"),
    ],
)
def test_mistakes_are_named(tokenizer: PreTrainedTokenizerFast, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_prompts(countdown(**changes), tokenizer, reward_kind="reasoning_gym")


def test_jsonl_with_math_verifier(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": f"{n}+1?", "answer": n + 1} for n in range(5)])
    Path(path).write_text("\n" + Path(path).read_text())
    dataset = load_prompts(DataConfig(path=path, size=3, raw_template="Q: {question}"), tokenizer)
    assert [prompt.text for prompt in dataset] == ["Q: 0+1?", "Q: 1+1?", "Q: 2+1?"]
    assert [prompt.verifier for prompt in dataset] == [{"answer": "1"}, {"answer": "2"}, {"answer": "3"}]
    assert dataset[0].solution is None
    with pytest.raises(ConfigError, match=r"record 0 of .*a\.jsonl \(line 2\) has no metadata\.source_dataset"):
        load_prompts(DataConfig(path=path), tokenizer, reward_kind="reasoning_gym")


def test_saved_reasoning_gym_entries_keep_their_task(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    entry = {
        "question": "?",
        "answer": "1+2",
        "metadata": {"source_dataset": "countdown", "numbers": [1, 2], "target": 3},
    }
    path = write_jsonl(tmp_path / "a.jsonl", [entry])
    config = DataConfig(path=path, raw_template="{target}|{numbers}=", solution_template="{answer}")
    (prompt,) = load_prompts(config, tokenizer, reward_kind="reasoning_gym")
    assert prompt.text == "3|1,2=" and prompt.solution == "1+2"
    assert prompt.verifier == {"task": "countdown", "entry": entry}
    # Arrow has no mapping of mixed types, so that a copy may keep the metadata as text
    write_jsonl(tmp_path / "a.jsonl", [{**entry, "metadata": json.dumps(entry["metadata"])}])
    assert list(load_prompts(config, tokenizer, reward_kind="reasoning_gym")) == [prompt]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"question": "q", "answer": 1}\n{"question": \n', r"bad\.jsonl:2 is not valid JSON"),
        (b'{"question": "q", "answer": 1}\n\xff\xff\n', r"bad\.jsonl:2 is not valid JSON"),
        (b"[1, 2]\n", r"bad\.jsonl:1 must hold a JSON object, not a list"),
        (b"\n\n", r"bad\.jsonl holds no records"),
        (
            b'{"question": "q"}\n',
            r"data\.answer_key 'answer' is missing in record 0 of .*bad\.jsonl \(line 1\); available: q",
        ),
        (b'{"question": "q", "answer": ""}\n', r"data\.answer_key 'answer' is empty in record 0"),
    ],
)
def test_jsonl_mistakes(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_prompts(DataConfig(path=str(tmp_path / "bad.jsonl")), tokenizer)


def test_missing_files(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path: cannot read .*none\.jsonl: No such file"):
        load_prompts(DataConfig(path=str(tmp_path / "none.jsonl")), tokenizer)
    with pytest.raises(ConfigError, match=r"data\.path: cannot read .*none: No such file"):
        load_prompts(DataConfig(source="datasets", path=str(tmp_path / "none")), tokenizer)


def test_datasets_from_local_folders(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    records = [{"problem": f"p{n}", "solution": str(n)} for n in range(4)]
    (tmp_path / "files").mkdir()
    write_jsonl(tmp_path / "files" / "train.jsonl", records)
    saved = datasets.Dataset.from_list(records)
    saved.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "splits"))

    def load(folder: str, **changes: Any) -> PromptDataset:
        settings = {"source": "datasets", "path": str(tmp_path / folder), "answer_key": "solution"}
        return load_prompts(DataConfig(**settings | {"raw_template": "{problem}"} | changes), tokenizer)

    for folder, options in (("files", {"cache_dir": str(tmp_path / "cache")}), ("saved", {}), ("splits", {})):
        dataset = load(folder, options=options, size=3)
        assert [prompt.text for prompt in dataset] == ["p0", "p1", "p2"], folder
        assert dataset[2].verifier == {"answer": "2"}
    with pytest.raises(ConfigError, match=r"data\.split: .* has no split 'test', only train"):
        load("splits", split="test")
    with pytest.raises(ConfigError, match=r"data\.split test: cannot load this dataset"):
        load("files", split="test", options={"cache_dir": str(tmp_path / "cache")})


def test_chat_template(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"ask": "1+1?", "answer": "2"}])
    config = DataConfig(path=path, template="chat", prompt_key="ask", system_prompt="Be brief.")
    prompt = load_prompts(config, tokenizer)[0]
    assert prompt.text == "[system]Be brief.<eos>[user]1+1?<eos>[assistant]"
    assert prompt.token_ids.count(tokenizer.eos_token_id) == 2
    assert tokenizer.convert_ids_to_tokens(prompt.token_ids[-11:]) == list("[assistant]")

    with pytest.raises(
        ConfigError, match=r"data\.prompt_key 'question' is missing in record 0 of .*; available: answer, ask"
    ):
        load_prompts(DataConfig(path=path, template="chat"), tokenizer)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ConfigError, match=r"data\.template chat: the tokenizer has no chat template"):
        load_prompts(config, bare)


def test_long_prompts(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    lengths = [5, 8, 9, 3, 12]
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "x" * n, "answer": str(n)} for n in lengths])
    with pytest.raises(
        ConfigError, match=r"prompt of record 2 of .* \(line 3\) has 9 tokens, above data\.max_prompt_tokens 8"
    ):
        load_prompts(DataConfig(path=path, max_prompt_tokens=8), tokenizer)
    dataset = load_prompts(DataConfig(path=path, max_prompt_tokens=8, on_long_prompt="skip"), tokenizer)
    assert [len(prompt.token_ids) for prompt in dataset] == [5, 8, 3]
    assert [prompt.index for prompt in dataset] == [0, 1, 2]
    assert [prompt.verifier["answer"] for prompt in dataset] == ["5", "8", "3"]
    assert dataset.num_skipped == 2
    with pytest.raises(ConfigError, match=r"data\.max_prompt_tokens 2 skips all 5 prompts"):
        load_prompts(DataConfig(path=path, max_prompt_tokens=2, on_long_prompt="skip"), tokenizer)


def test_vocabulary_must_fit_the_model(tokenizer: PreTrainedTokenizerFast) -> None:
    size = len(tokenizer)
    check_vocabulary(tokenizer, size)
    check_vocabulary(tokenizer, size + 100)
    with pytest.raises(ConfigError, match=rf"token '\\n' the id {size - 1}, .* ends at {size - 2}"):
        check_vocabulary(tokenizer, size - 1)


def test_cursor_covers_each_epoch_once_in_a_new_order() -> None:
    cursor = PromptCursor(numbered(10), seed=3)
    epochs = [[prompt.index for prompt in cursor.next(10)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [p.index for p in PromptCursor(numbered(10), seed=3).next(10)] == epochs[0]
    assert [p.index for p in PromptCursor(numbered(10), seed=4).next(10)] != epochs[0]


def test_cursor_without_shuffle_wraps() -> None:
    cursor = PromptCursor(numbered(4), seed=0, shuffle=False)
    assert [p.index for p in cursor.next(3)] == [0, 1, 2]
    assert [p.index for p in cursor.next(7)] == [3, 0, 1, 2, 3, 0, 1]
    assert (cursor.epoch, cursor.position) == (2, 2)


@pytest.mark.parametrize("drawn", range(0, 25, 3))
def test_cursor_resumes_exactly(drawn: int) -> None:
    whole = [p.index for p in PromptCursor(numbered(7), seed=1).next(40)]
    first = PromptCursor(numbered(7), seed=1)
    first.next(drawn)
    second = PromptCursor(numbered(7), seed=1)
    second.next(2)
    second.load_state(json.loads(json.dumps(first.state())))
    assert [p.index for p in second.next(40 - drawn)] == whole[drawn:]


def test_cursor_refuses_the_state_of_other_data() -> None:
    state = PromptCursor(numbered(7), seed=1).state()
    with pytest.raises(ConfigError, match=r"the prompts themselves changed"):
        PromptCursor(numbered(8), seed=1).load_state(state)
    with pytest.raises(ConfigError, match=r"run\.seed, data\.shuffle changed"):
        PromptCursor(numbered(7), seed=2, shuffle=False).load_state(state)
