"""Every kind of file gives the same records, each mistake in one is named, and little of a large one stays in memory."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import shutil
import tracemalloc
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

from megatron_reheat.config_data import DataConfig
from megatron_reheat.data import records as records_module
from megatron_reheat.data.prompts import PromptCursor, PromptDataset, load_prompts
from megatron_reheat.data.sources import read_records
from megatron_reheat.errors import ConfigError, ReheatError
from tests.character_tokenizer import character_tokenizer

TOKENIZER = character_tokenizer()
RECORDS = [
    {"question": "What is $1+1$?", "answer": "2"},
    {"question": 'two\nlines, "quoted"', "answer": "0.10"},
    {"question": "ümlaut 中文 \u2028 end", "answer": "-3"},
]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def write_csv(path: Path, records: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)


def write_parquet(path: Path, records: list[dict[str, Any]]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(records), path)


def gzipped(write: Callable[[Path, list[dict[str, Any]]], object]) -> Callable[[Path, list[dict[str, Any]]], None]:
    def write_gzipped(path: Path, records: list[dict[str, Any]]) -> None:
        write(path.with_suffix(""), records)
        path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))

    return write_gzipped


def write_json(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(records, indent=1))


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


WRITERS = {
    "a.jsonl": write_lines,
    "a.json": write_json,
    "lines.json": write_lines,
    "a.csv": write_csv,
    "a.jsonl.gz": gzipped(write_lines),
    "a.json.gz": gzipped(write_json),
    "lines.json.gz": gzipped(write_lines),
    "a.csv.gz": gzipped(write_csv),
    "A.PARQUET": write_parquet,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def load(path: Any, **settings: Any) -> PromptDataset:
    return load_prompts(DataConfig(path=path if isinstance(path, list) else str(path), **settings), TOKENIZER)


def refused(path: Any, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- kinds ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["files", "jsonl", "datasets"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_holds_the_same_records(name: str, source: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, RECORDS)
    dataset = load(tmp_path / name, source=source)
    assert [(p.text, p.verifier["answer"]) for p in dataset] == [(r["question"], r["answer"]) for r in RECORDS]
    assert dataset[1] == list(dataset)[1] and dataset[-1].index == 2
    assert list(dataset.verifiers()) == [p.verifier for p in dataset]
    assert load(tmp_path / name, source=source, size=2).take([0, 1]) == list(dataset)[:2]


def test_several_files_follow_each_other(tmp_path: Path) -> None:
    names = ["a.jsonl", "a.csv", "A.PARQUET", "a.json.gz"]
    for i, name in enumerate(names):
        WRITERS[name](tmp_path / name, [{"question": f"{i}.{n}", "answer": str(n)} for n in range(i + 1)])
    paths = [str(tmp_path / name) for name in names]
    assert [p.text for p in load(paths)] == [f"{i}.{n}" for i in range(4) for n in range(i + 1)]
    write_parquet(tmp_path / "A.PARQUET", [{"question": "x", "answer": "1"}, {"question": None, "answer": "1"}])
    assert f"is null in record 1 of {tmp_path / 'A.PARQUET'}" in refused(paths)


def test_values_are_what_the_text_spells(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer\nq,033\n,NA\n")
    assert list(read_records(DataConfig(path=str(tmp_path / "a.csv")))) == [
        {"question": "q", "answer": "033"},
        {"question": "", "answer": "NA"},
    ]
    mixed = [
        {"question": "q", "answer": 1, "meta": {"a": 1}},
        {"question": "q", "answer": "x", "meta": {"b": [1.0, 2]}},
    ]
    write_lines(tmp_path / "a.jsonl", mixed)
    assert list(read_records(DataConfig(path=str(tmp_path / "a.jsonl")))) == mixed
    table = pyarrow.table({"question": ["q"], "answer": [Decimal("1.50")]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet")[0].verifier["answer"] == "1.50"


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b"\xef\xbb\xbf\n\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "lines.json", "a.jsonl.gz"])
def test_a_byte_order_mark_is_left_out(name: str, mark: bytes, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, RECORDS)
    content = (tmp_path / name).read_bytes()
    packed = name.endswith(".gz")
    marked = gzip.compress(mark + gzip.decompress(content)) if packed else mark + content
    (tmp_path / name).write_bytes(marked)
    assert [p.text for p in load(tmp_path / name)] == [r["question"] for r in RECORDS]


def test_a_byte_order_mark_in_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfquestion,answer\nq,1\n")
    assert load(tmp_path / "a.csv")[0].text == "q"


def test_files_without_a_name_of_their_kind(tmp_path: Path) -> None:
    (tmp_path / "train").write_bytes(LINES)
    assert len(load(tmp_path / "train", source="jsonl")) == 3
    assert refused(tmp_path / "train") == (
        f"data.path: {tmp_path / 'train'} is none of .jsonl, .json, .csv, .jsonl.gz, .json.gz, .csv.gz, .parquet; "
        "rename or convert it"
    )


def test_another_parquet_file_with_the_same_name_and_time_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for answer in ("1", "2"):
        write_parquet(path, [{"question": "q", "answer": answer}])
        os.utime(path, (0, 0))
        assert load(path)[0].verifier["answer"] == answer


# -- mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "data.path: FILE is an empty file"),
        ("a.jsonl", b"\n \n", "data.path: FILE holds no records"),
        ("a.csv", b"question,answer\n", "data.path: FILE holds no records"),
        ("a.json", b"[]", "data.path: FILE holds no records"),
        ("a.txt", b"q", "data.path: FILE is none of .jsonl, "),
        ("a.jsonl", LINES + b'\n{"question": "a", "question": "b"}', "FILE:5 is not valid JSON: the key 'question' stands in"),
        ("a.jsonl", LINES + b'{"q": {"a": 1, "a": 2}}', "FILE:4 is not valid JSON: the key 'a' stands in one object twice"),
        ("a.jsonl", LINES + b'{"question": "\xff"}\n', "FILE:4 is not valid JSON: 'utf-8' codec can't decode byte 0xff"),
        ("a.jsonl", LINES.decode().encode("utf-16"), "FILE:1 is not valid JSON: 'utf-8' codec can't decode byte 0xff"),
        ("a.jsonl", LINES + b"[1]\n", "FILE:4 must hold a JSON object, not a list"),
        ("a.jsonl", b'{"q": ' + b"[" * 10**5 + b"\n", "FILE:1 is not valid JSON: it is nested too deeply"),
        ("a.json", b'[{"question": "q", "answer": 1}, 2]', "record 1 of FILE must be a JSON object, not a int"),
        ("a.json", b'[{"question": "q"},', "FILE is not valid JSON: Expecting value"),
        ("a.json", b'[{"question":\n"\xff"}]', "FILE:2 is not UTF-8"),
        ("a.json", b'{\n"data": []}', "; a .json file holds an array of records, or one record a line"),
        ("a.csv", b"question,answer\nq\n", "FILE:2 has 1 fields, its header 2"),
        ("a.csv", b"question,question\nq,1\n", "FILE has two columns 'question'; rename one of them"),
        ("a.csv", b'question,answer\n"q,1\n', "FILE:2 cannot be read as CSV: unexpected end of data"),
        ("a.csv", b"question,answer\nq,1\nz,\xe9\n", "FILE:3 is not UTF-8"),
        ("a.parquet", b"PAR1 no PAR1", "FILE cannot be read as parquet ("),
        ("a.jsonl.gz", LINES, "FILE cannot be read as gzip (Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-9], "FILE cannot be read as gzip (Compressed file ended before"),
        ("a.jsonl.gz", gzip.compress(LINES + b"{"), "FILE:4 is not valid JSON"),
        ("a.csv.gz", gzip.compress(b"question,answer\n\xe9,1\n", mtime=0), "FILE:2 is not UTF-8"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.jsonl").write_bytes(LINES)
    for path in (tmp_path / name, [str(tmp_path / "good.jsonl"), str(tmp_path / name)]):
        assert message.replace("FILE", str(tmp_path / name)) in refused(path)


def test_parquet_files_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"question": pyarrow.array([], "string")}), path)
    assert refused(path) == f"data.path: {path} holds no records"
    parquet.write_table(pyarrow.Table.from_arrays([["q"], ["q"]], ["question", "question"]), path)
    assert refused(path) == f"{path} has two columns 'question'; rename one of them"
    texts = pyarrow.array([b"ok", b"\xff"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"question": texts, "answer": ["1", "2"]}), path)
    assert refused(path).startswith(f"record 1 of {path} cannot be read: 'utf-8' codec can't decode byte 0xff")


def test_a_records_line_counts_the_blank_ones(tmp_path: Path) -> None:
    records = [json.dumps({"question": "q", "answer": "1"})] * 3
    (tmp_path / "a.jsonl").write_text("\n\n" + "\n \n\n".join(records) + "\n\n")
    read = read_records(DataConfig(path=str(tmp_path / "a.jsonl")))
    lines = (tmp_path / "a.jsonl").read_text().split("\n")
    for i in range(3):
        number = [n for n, line in enumerate(lines, start=1) if line.strip()][i]
        assert read.where(i) == f"record {i} of {tmp_path / 'a.jsonl'} (line {number})"


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    assert refused(tmp_path / "no.parquet").startswith(
        f"data.path: cannot read {tmp_path / 'no.parquet'}: No such file"
    )
    (tmp_path / "folder").mkdir()
    assert "cannot read" in refused([str(tmp_path / "folder")])
    assert "doesn't contain any data files" in refused(tmp_path / "folder")
    (tmp_path / "folder" / "a.xyz").write_text("x")
    assert "No (supported) data files found" in refused(tmp_path / "folder")
    for path in ([], [""], "", 3, {"train": "a.jsonl"}):
        with pytest.raises(ValueError, match="must be a file, a folder or a list of files"):
            DataConfig(path=path)  # type: ignore[arg-type]


def test_a_folder_needs_no_source(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00001.parquet", RECORDS)
    assert [p.text for p in load(tmp_path)] == [r["question"] for r in RECORDS]


def test_options_that_mean_nothing_for_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    message = refused(tmp_path / "a.jsonl", options={"name": "en"})
    assert message == (f"data.options {{'name': 'en'}} mean nothing for {tmp_path / 'a.jsonl'}; set data.options=null")
    write_parquet(tmp_path / "a.parquet", RECORDS)
    assert len(load(tmp_path / "a.parquet", options={"columns": ["question", "answer"]})) == 3
    assert "unexpected keyword argument 'colums'" in refused(tmp_path / "a.parquet", options={"colums": ["question"]})
    assert "data.options must not hold split" in refused(tmp_path / "a.parquet", options={"split": "train"})


def test_the_section_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"ask": "q"}\n')
    for settings, key in (
        ({"path": str(tmp_path / "none.jsonl")}, "path"),
        ({"options": {"a": 1}}, "options"),
        ({}, "raw_template"),
        ({"template": "chat"}, "prompt_key"),
        ({"raw_template": "{ask}"}, "answer_key"),
        ({"raw_template": "{ask}{ask}", "answer_key": "ask", "max_prompt_tokens": 1}, "max_prompt_tokens"),
        ({"raw_template": "{ask}", "answer_key": "ask", "solution_template": "{x}"}, "solution_template"),
        ({"source": "reasoning_gym", "name": "countdwon"}, "name"),
        ({"source": "datasets", "path": None, "name": str(tmp_path / "hub")}, "name"),
    ):
        config = DataConfig(**{"path": str(tmp_path / "a.jsonl"), **settings})
        with pytest.raises(ConfigError) as caught:
            load_prompts(config, TOKENIZER, section="eval.data")
        assert f"eval.data.{key}" in str(caught.value) and " data." not in f" {caught.value}"


# -- large files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv"])
def test_a_record_takes_a_few_bytes_of_memory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "SPOOL_BYTES", 2**16)
    count = 4000
    made = [{"question": f"{n} " + "long " * 40, "answer": str(n), "other": "x" * 200} for n in range(count)]
    {**WRITERS, "a.parquet": write_parquet}[name](tmp_path / name, made)
    load(tmp_path / name)  # what is imported and compiled stays
    tracemalloc.start()
    try:
        dataset = load(tmp_path / name)
        cursors = [PromptCursor(dataset, seed=seed) for seed in (0, 1)]
        drawn = [cursor.next(2)[0] for cursor in cursors]
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / count < 120, f"{held / count:.0f} bytes a record"
    assert all(p.verifier == {"answer": p.text.split()[0]} for p in drawn)


def test_orders_are_those_of_lists(tmp_path: Path) -> None:
    """What earlier versions drew, checkpoints of theirs go on with."""
    write_lines(tmp_path / "a.jsonl", [{"question": str(n), "answer": "1"} for n in range(50)])
    for seed in (0, 7):
        drawn = [p.index for p in PromptCursor(load(tmp_path / "a.jsonl"), seed=seed).next(100)]
        expected: list[int] = []
        for epoch in (0, 1):
            order = list(range(50))
            random.Random(f"{seed}/{epoch}").shuffle(order)
            expected += order
        assert drawn == expected


def test_a_file_that_changes_under_a_run_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    dataset = load(path)
    content = path.read_bytes()
    for changed in (content.replace(b"1+1", b"1+2"), content[:20], b""):
        path.write_bytes(changed)
        with pytest.raises(ReheatError, match=r"record 0 of .*a\.jsonl \(line 1\) was changed while the run reads it"):
            dataset[0]
    path.write_bytes(content)
    assert dataset[0].text == RECORDS[0]["question"]
    shutil.copy(path, tmp_path / "new")
    path.unlink()  # or replaced by another: the run keeps its own
    assert dataset[0].text == RECORDS[0]["question"]


def test_duplicates_are_counted_and_can_be_left_out(tmp_path: Path) -> None:
    unique = [{"question": f"q{n}", "answer": str(n)} for n in range(5)]
    records = [*unique, *unique, {"question": "q0", "answer": "other"}, {"question": "last", "answer": "9"}]
    write_lines(tmp_path / "a.jsonl", records)
    every = load(tmp_path / "a.jsonl")
    assert (len(every), every.num_duplicates) == (12, 6)
    assert every.describe() == [
        "data: 12 prompts of 12 records; 6 are duplicates (data.deduplicate=true leaves them out), 1 with another answer"
    ]
    distinct = load(tmp_path / "a.jsonl", deduplicate=True)
    assert [p.text for p in distinct] == ["q0", "q1", "q2", "q3", "q4", "last"]
    assert [p.verifier["answer"] for p in distinct] == ["0", "1", "2", "3", "4", "9"]
    assert [p.index for p in distinct] == list(range(6))
    assert distinct.describe() == ["data: 6 prompts of 12 records; 6 duplicates left out, 1 with another answer"]
    # `size` counts what is left, and a prompt that is too long is one that was looked at
    assert [p.text for p in load(tmp_path / "a.jsonl", deduplicate=True, size=6)] == [p.text for p in distinct]
    short = load(tmp_path / "a.jsonl", deduplicate=True, size=6, max_prompt_tokens=3, on_long_prompt="skip")
    assert (len(short), short.num_skipped, short.num_duplicates) == (5, 1, 6)


def test_duplicates_are_not_tokenized_again(tmp_path: Path) -> None:
    class Counting(PreTrainedTokenizerFast):
        def __call__(self, text: Any, **options: Any) -> Any:
            seen.extend(text)
            return super().__call__(text, **options)

    seen: list[str] = []
    write_lines(tmp_path / "a.jsonl", [{"question": "a" * n, "answer": "1"} for n in (1, 2, 3)] * 400)
    tokenizer = character_tokenizer()
    tokenizer.__class__ = Counting
    config = DataConfig(
        path=str(tmp_path / "a.jsonl"), max_prompt_tokens=2, on_long_prompt="skip", add_special_tokens=False
    )
    dataset = load_prompts(config, tokenizer)
    assert (len(dataset), dataset.num_skipped, dataset.longest) == (800, 400, 2)
    assert seen == ["a", "aa", "aaa"]
