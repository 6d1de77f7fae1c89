"""Evaluation suites on small local copies of the hub's schemas, what is refused before an engine starts, and the report."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from megatron_reheat.config_data import DataConfig
from megatron_reheat.data.prompts import load_prompts
from megatron_reheat.errors import ConfigError
from megatron_reheat.evaluation.results import EvalOptions, SuiteResult, estimates, print_table, results_table
from megatron_reheat.evaluation.suites import BOXED, SUITES, TAGGED, SuitePrompts, load_suites
from megatron_reheat.rewards.graders import grader_of
from tests.character_tokenizer import character_tokenizer
from tests.e2e import runs

# one record in the form of each dataset; the problems are ours
RECORDS: dict[str, dict[str, Any]] = {
    "math500": {"problem": "What is $1+1$?", "solution": "Two.", "answer": "2", "subject": "Algebra", "level": 1},
    "aime24": {"id": 60, "problem": "Find $n$.", "solution": "So.", "answer": "033", "url": "u", "year": "2024"},
    "aime25": {"problem": "Find $n$.", "answer": "70", "id": "0"},
    "aime26": {"problem_idx": 1, "answer": 277, "problem": "Find $n$."},
    "amc23": {"id": 0, "answer": 27.0, "url": "u", "question": "How far?"},
    "olymmath_en_easy": {"problem": "Find $x$.", "answer": "$\\frac{1}{2}$", "subject": "Algebra", "unique_id": "a"},
    "olymmath_en_hard": {"problem": "Find $x$.", "answer": "$2\\sqrt{3}$", "subject": "Geometry", "unique_id": "b"},
    "gpqa_diamond": {
        "Question": "Which is a noble gas?",
        "Correct Answer": "neon",
        "Incorrect Answer 1": "iron\n",
        "Incorrect Answer 2": "gold",
        "Incorrect Answer 3": "lead",
        "Subdomain": "Chemistry",
    },
}
RIGHT = {
    "math500": "2.0", "aime24": "33", "aime25": "70", "aime26": "277", "amc23": "27", "olymmath_en_easy": "0.5",
    "olymmath_en_hard": "\\sqrt{12}",
}  # fmt: skip
COUNTDOWN = "reasoning_gym:countdown:{min_numbers: 2, max_numbers: 2, size: 5}"


TOKENIZER = character_tokenizer("{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}")


def write_jsonl(folder: Path, name: str, records: list[dict[str, Any]]) -> Path:
    path = folder / name / "test.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def load(name: str, data_root: Path | None = None, template: str = "raw", limit: int | None = None) -> SuitePrompts:
    return load_suites([name], TOKENIZER, template=template, limit=limit, data_root=data_root)[0]


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*arguments, **options)
    assert "\n" not in str(caught.value) and "vllm" not in sys.modules
    return str(caught.value)


# -- the suites' schemas ---------------------------------------------------------------------------------------------


def test_every_suite_has_a_record_here() -> None:
    assert RECORDS.keys() == SUITES.keys()


@pytest.mark.parametrize("name", RIGHT)
def test_a_local_copy_becomes_prompts_that_the_grader_scores(name: str, tmp_path: Path) -> None:
    suite = load(name, write_jsonl(tmp_path, name, [RECORDS[name]]))
    (prompt,) = suite.prompts
    question = RECORDS[name].get("problem") or RECORDS[name]["question"]
    assert prompt.text == question + BOXED and len(prompt.token_ids) == len(prompt.text)
    assert suite.reward_kind == "math"
    assert suite.source.startswith(f"{tmp_path / name}, a copy of {SUITES[name].hub_id}, config ")
    assert grader_of("math")(f"So it is \\boxed{{{RIGHT[name]}}}.", prompt.verifier) == 1.0
    assert grader_of("math")("So it is \\boxed{1234}.", prompt.verifier) == 0.0


def test_parquet_and_jsonl_copies_give_the_same_prompts(tmp_path: Path) -> None:
    records = [{**RECORDS["aime26"], "answer": i} for i in range(4)]
    jsonl = write_jsonl(tmp_path / "a", "aime26", records)
    (tmp_path / "b" / "aime26").mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "b" / "aime26" / "train-00000.parquet")
    assert load("aime26", jsonl).prompts == load("aime26", tmp_path / "b").prompts
    assert [p.verifier["answer"] for p in load("aime26", jsonl, limit=3).prompts] == ["0", "1", "2"]


def test_templates(tmp_path: Path) -> None:
    root = write_jsonl(tmp_path, "math500", [RECORDS["math500"]])
    assert load("math500", root, "chat").prompts[0].text == f"<user>What is $1+1$?{BOXED}</user>"
    assert load("math500", root, "{subject}: {problem} =").prompts[0].text == "Algebra: What is $1+1$? ="
    assert "--template 'row' must be chat, raw, or a text with {fields}" in refused("math500", root, "row")
    message = refused("math500", root, "{problm}")
    assert message.startswith(
        f"suite math500: --template names 'problm', which record 0 of {root / 'math500'} lacks; available: answer, "
    )


def test_raw_prompts_begin_like_those_of_training(tmp_path: Path) -> None:
    root = write_jsonl(tmp_path, "math500", [RECORDS["math500"]])
    llama: Any = character_tokenizer(adds="<bos> $A")
    trained = load_prompts(DataConfig(path=str(root / "math500" / "test.jsonl"), raw_template="{problem}"), llama)[0]
    for template in ("raw", "{problem}", "<bos>{problem}"):
        prompt = load_suites(["math500"], llama, template=template, data_root=root)[0].prompts[0]
        assert prompt.token_ids[: len(trained.token_ids)] == trained.token_ids
        assert prompt.token_ids.count(llama.bos_token_id) == 1


def test_arguments_of_the_chat_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_jsonl(tmp_path, "math500", [RECORDS["math500"]])
    template = "{{ messages[0].content }}{% if enable_thinking is false %}<think></think>{% endif %}"
    monkeypatch.setattr(TOKENIZER, "chat_template", template)

    def load_chat(kwargs: str, template: str = "chat") -> SuitePrompts:
        return load_suites(["math500"], TOKENIZER, template=template, chat_template_kwargs=kwargs, data_root=root)[0]

    assert load_chat("").prompts[0].text == f"What is $1+1$?{BOXED}"
    assert load_chat("{enable_thinking: false}").prompts[0].text == f"What is $1+1$?{BOXED}<think></think>"
    (note,) = load_chat("{enable_thinkin: false}").notes
    assert note == "the chat template does not know 'enable_thinkin' of --chat-template-kwargs"
    with pytest.raises(ConfigError, match=r"--chat-template-kwargs 'off' are not a YAML mapping; write \{enable_"):
        load_chat("off")
    with pytest.raises(ConfigError, match=r"--chat-template-kwargs needs --template chat"):
        load_chat("{enable_thinking: false}", template="raw")
    monkeypatch.setattr(TOKENIZER, "chat_template", "{{ raise_exception('no\nusers here') }}")
    assert refused("math500", root, "chat") == (
        f"suite math500: --template chat: the chat template of the tokenizer does not render record 0 of "
        f"{root / 'math500'} (roles: user): no users here"
    )


def test_the_chat_template_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "chat_template", None)
    root = write_jsonl(tmp_path, "math500", [RECORDS["math500"]])
    assert refused("math500", root, "chat").endswith("has no chat template; use --template raw")


# -- GPQA ------------------------------------------------------------------------------------------------------------


def test_gpqa_options_are_permuted_the_same_way_every_time(tmp_path: Path) -> None:
    root = write_jsonl(tmp_path, "gpqa_diamond", [RECORDS["gpqa_diamond"]] * 40)
    prompts = list(load("gpqa_diamond", root).prompts)
    assert prompts == list(load("gpqa_diamond", root).prompts)
    assert prompts[:3] == list(load("gpqa_diamond", root, limit=3).prompts)
    letters = [prompt.verifier["answer"] for prompt in prompts]
    assert set(letters) == set("ABCD") and max(letters.count(letter) for letter in "ABCD") < 20
    for prompt, letter in zip(prompts, letters, strict=True):
        options = dict(line.split(") ", 1) for line in prompt.text.splitlines() if line[1:3] == ") ")
        assert sorted(options.values()) == ["gold", "iron", "lead", "neon"] and options[letter] == "neon"
        for form in ("{}", "\\text{{{}}}", "({})", "{}) neon", "\\text{{({}) neon}}", "\\textbf{{{}.}} $10^{{-5}}$ m"):
            for other in "ABCD":
                graded = grader_of("math")(f"\\boxed{{{form.format(other)}}}", prompt.verifier)
                assert graded == float(other == letter)


def test_gpqa_as_the_csv_file_that_its_page_offers(tmp_path: Path) -> None:
    good = RECORDS["gpqa_diamond"]
    (tmp_path / "csv" / "gpqa_diamond").mkdir(parents=True)
    with (tmp_path / "csv" / "gpqa_diamond" / "gpqa_diamond.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, good)
        writer.writeheader()
        writer.writerows([good, good])
    jsonl = write_jsonl(tmp_path, "gpqa_diamond", [good, good])
    assert load("gpqa_diamond", tmp_path / "csv").prompts == load("gpqa_diamond", jsonl).prompts


def test_gpqa_from_the_hub_says_that_it_is_gated() -> None:
    message = refused("gpqa_diamond")
    assert message.startswith(
        "suite gpqa_diamond: data.name Idavidrein/gpqa, data.split train: cannot load this dataset"
    )
    assert "accept its terms at https://huggingface.co/datasets/Idavidrein/gpqa and log in (`hf auth login`)" in message


def test_answers_that_no_response_can_give_are_refused(tmp_path: Path) -> None:
    for i, answer in enumerate((float("nan"), [1, 2], {"value": 1}, True)):
        root = write_jsonl(tmp_path / str(i), "math500", [RECORDS["math500"] | {"answer": answer}])
        assert f"column 'answer' in record 0 of {root / 'math500'} " in refused("math500", root)
    root = write_jsonl(tmp_path / "number", "math500", [RECORDS["math500"] | {"answer": 1e-05}])
    assert load("math500", root).prompts[0].verifier == {"answer": "0.00001"}


# -- reasoning-gym ---------------------------------------------------------------------------------------------------


def test_reasoning_gym_makes_the_same_problems_every_time() -> None:
    suite = load(COUNTDOWN)
    assert suite.reward_kind == "reasoning_gym" and len(suite.prompts) == 5
    assert suite.prompts == load(COUNTDOWN).prompts
    assert list(suite.prompts)[:2] == list(load(COUNTDOWN, limit=2).prompts)
    assert suite.prompts != load(COUNTDOWN.replace("size", "seed: 1, size")).prompts
    for prompt in suite.prompts:
        entry = prompt.verifier["entry"]
        assert prompt.text == entry["question"] + TAGGED
        assert grader_of("reasoning_gym")(f"<answer>{entry['metadata']['expression']}</answer>", prompt.verifier) == 1.0
        assert grader_of("reasoning_gym")("<answer>1</answer>", prompt.verifier) == 0.0


def test_a_templates_fields_include_those_of_the_metadata() -> None:
    (prompt,) = load(COUNTDOWN, template="{target}|{numbers}=", limit=1).prompts
    metadata = prompt.verifier["entry"]["metadata"]
    assert prompt.text == f"{metadata['target']}|{','.join(map(str, metadata['numbers']))}="


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("math5000", "unknown suite 'math5000'; did you mean 'math500'?"),
        ("AIME24", "unknown suite 'AIME24'; did you mean 'aime24'?"),
        ("xyz", "unknown suite 'xyz'; known: math500, aime24, "),
        ("countdown", "unknown suite 'countdown'; "),
        ("reasoning_gym:countdwon", "suite reasoning_gym:countdwon: data.name: reasoning-gym has no task 'countdwon'; did"),
        ("reasoning_gym:", "reasoning_gym needs a task"),
        ("reasoning_gym:countdown:[1]", "options '[1]' are not a YAML mapping"),
        ("reasoning_gym:countdown:{min_number: 1}", "data.options does not fit reasoning-gym task countdown"),
        ("reasoning_gym:countdown:{size: many}", "whole numbers for size and seed"),
        ("reasoning_gym:countdown:{seed: -1}", "seed from 0 to 4294967295"),
        ("reasoning_gym:countdown:{from: 2024-02-30}", "from"),  # not a day, and no reason to fail on it as one
    ],
)  # fmt: skip
def test_unknown_suites_and_options(name: str, message: str) -> None:
    assert message in refused(name)


def test_a_suite_named_twice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--suite reasoning_gym:countdown.* is named twice; name each suite once"):
        load_suites([COUNTDOWN, COUNTDOWN], TOKENIZER, template="raw")


def test_no_hub_access_names_both_ways_out() -> None:
    message = refused("math500")
    assert message.startswith(
        "suite math500: data.name HuggingFaceH4/MATH-500, data.split test: cannot load this dataset"
    )
    assert message.endswith("HF_HUB_OFFLINE, or put its files into DATA_ROOT/math500/ and pass --data-root")


def test_local_copies_that_cannot_be_used(tmp_path: Path) -> None:
    assert refused("aime25", tmp_path) == f"suite aime25: --data-root: {tmp_path / 'aime25'} does not exist"
    (tmp_path / "aime25").mkdir()
    assert refused("aime25", tmp_path).endswith("aime25 has no file of .jsonl, .parquet, .csv")
    (tmp_path / "aime25" / "test.jsonl").write_text("\n")
    assert refused("aime25", tmp_path).endswith("test.jsonl holds no records")
    (tmp_path / "aime25" / "test.jsonl").write_text('{"problem": "p", "answer": "1"}\n{"problem"\n')
    assert "test.jsonl:2 is not valid JSON" in refused("aime25", tmp_path)
    (tmp_path / "aime25" / "test.jsonl").unlink()
    (tmp_path / "aime25" / "test.parquet").write_bytes(b"PAR0")
    assert "test.parquet cannot be read as parquet" in refused("aime25", tmp_path)


@pytest.mark.parametrize(
    ("name", "column"), [("math500", "problem"), ("aime26", "answer"), ("gpqa_diamond", "Incorrect Answer 2")]
)
def test_a_missing_or_empty_column_is_named(name: str, column: str, tmp_path: Path) -> None:
    good = RECORDS[name]
    lacking = {key: value for key, value in good.items() if key != column}
    root = write_jsonl(tmp_path / "a", name, [good, lacking])
    message = refused(name, root)
    assert message.startswith(
        f"suite {name}: column {column!r} is missing in record 1 of {root / name}; its columns are "
    )
    root = write_jsonl(tmp_path / "b", name, [{**good, column: ""}])
    assert f"column {column!r} is empty in record 0" in refused(name, root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n", "0"], "--n 0 must be at least 1"),
        (["--limit", "0"], "--limit 0 must be at least 1"),
        (["--temperature", "0"], "--temperature 0 is greedy: 8 samples would be the same one; use --n 1"),
        (["--temperature", "3"], "--temperature 3 is outside 0 to 2"),
        (["--temperature", "0.001"], "--temperature 0.001 is below 0.01, at which vLLM would sample instead"),
        (["--temperature", "nan"], "--temperature nan is outside 0 to 2"),
        (["--n", "20000"], "--n 20000 is above vLLM's limit of 16384"),
        (["--seed", "-1"], "--seed -1 must not be negative"),
        (["--engine", "mode=server"], "--engine: mode has no part in an evaluation"),
        (["--engine", "temperature=0.5"], "--engine: temperature has no part in an evaluation"),
        (["--engine", "max_num_seqs=many"], "--engine: rollout.max_num_seqs: Input should be a valid integer"),
        (["--top-p", "0"], "--top-p 0 must be above 0 and at most 1"),
        (["--engine", "enforce_eagr=1"], "--engine: rollout.enforce_eagr: unknown key; did you mean 'enforce_eager'?"),
        (["--suite", "math501"], "unknown suite 'math501'; did you mean 'math500'?"),
        (["--data-root", "nowhere"], "suite math500: --data-root: nowhere/math500 does not exist"),
        (["--max-tokens", "60"], "a prompt of 30 tokens + --max-tokens 60 exceeds the context of 64 tokens"),
        (["--out", "FILE"], "--out: cannot make FILE"),
    ],
)  # fmt: skip
def test_the_command_refuses_before_an_engine_starts(
    options: list[str], message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_reheat.cli import main

    root = model.parent / "data"
    (model.parent / "file").touch()
    options = [str(model.parent / "file" / "out") if option == "FILE" else option for option in options]
    arguments = ["eval", str(model), "--suite", "math500", "--data-root", str(root), "--max-tokens", "8"]
    arguments += ["--template", "{problem}" + " " * 16, *options]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message.replace("FILE", str(model.parent / "file" / "out")) in captured.err
    assert "vllm" not in sys.modules


def test_a_folder_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_reheat.cli import main

    assert main(["eval", str(tmp_path), "--suite", "math500"]) == 1
    assert capsys.readouterr().err == (
        f"error: MODEL: {tmp_path} has no config.json; point it at a Hugging Face model folder\n"
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suites")
    write_jsonl(folder / "data", "math500", [RECORDS["math500"]])
    return runs.make_model_folder(folder / "model")


# -- the report ------------------------------------------------------------------------------------------------------


def test_estimates_are_pass_at_powers_of_two_with_intervals() -> None:
    correct = np.array([[True] * 6, [False] * 6, [True, False, False, False, False, False]])
    found = estimates(correct)
    assert list(found) == [1, 2, 4]
    assert [e.mean for e in found.values()] == pytest.approx([7 / 18, 4 / 9, 5 / 9])
    assert all(e.low <= e.mean <= e.high for e in found.values())


def test_the_table_shows_every_number(capsys: pytest.CaptureFixture[str]) -> None:
    options = EvalOptions(model="some/model", suites=("math500",), n=4)
    found = estimates(np.array([[True, False, False, False], [False] * 4]))
    result = SuiteResult("math500", "hub", 2, 4, found[1], found, 123.4, 0.25, 1, 61.25, 2.0, 12345.6)
    print_table(results_table([result], options))
    shown = capsys.readouterr().out
    for text in (
        "some/model", "avg@4 = pass@1", "pass@2", "pass@4", "0.125", "0.250", "0.500", "[0.000, 0.250]", "math500", "123",
        "25.0%", "61.2", "12,346",
    ):  # fmt: skip
        assert text in shown, text
    assert "pass@8" not in shown and "…" not in shown
