"""`reheat compare` on tiny models: what it writes and prints, what it leaves out and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from examples.countdown_cpu.make_model import make_tokenizer
from megatron_reheat.cli import main
from megatron_reheat.commands.compare import CompareOptions, _displacement, _probe_files
from megatron_reheat.commands.convert import to_hf
from megatron_reheat.config import ModelConfig
from megatron_reheat.microscope.table import WIDTH
from megatron_reheat.run_folder import RunFolder
from megatron_reheat.stages.inputs import read_model
from tests.character_tokenizer import character_tokenizer
from tests.tiny_models import VOCAB_SIZE, save_tiny_model
from tests.unit.test_convert import megatron_tensors, save_run
from tests.unit.test_microscope import write

# torch's writer says that it works without a process group, which is the point
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PROBLEMS = [("12|3,4=", "3*4"), ("7|3,4=", "3+4"), ("1|9,8=", "9-8"), ("5|1,4=", "4+1")]
RECORDS = [{"prompt": prompt, "response": response} for prompt, response in PROBLEMS]


def save_model(folder: Path, seed: int = 0, family: str = "llama", tokenizer: Any = None, **changes: Any) -> Path:
    save_tiny_model(family, folder, seed=seed, **changes)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    models = {name: save_model(root / name, seed) for seed, name in enumerate(("first", "second", "third"))}
    models["shallow"] = save_model(root / "shallow", num_hidden_layers=2)
    models["other words"] = save_model(root / "words", tokenizer=character_tokenizer(None))
    models["padded"] = save_model(root / "padded", vocab_size=VOCAB_SIZE + 5)
    return models


@pytest.fixture
def trained(models: dict[str, Path], tmp_path: Path) -> Path:
    """A run whose checkpoint holds the first model."""
    save_run(tmp_path / "trained", models["first"], megatron_tensors(models["first"]))
    write(tmp_path / "trained" / "rollouts" / "step-000030.jsonl", *RECORDS)
    return tmp_path / "trained"


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`reheat compare A B ARGUMENTS` in a folder of its own, on the problems unless --data names others."""
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path / "probe.jsonl", *RECORDS)

    def run(a: Path, b: Path, *arguments: object, on_problems: bool = True) -> int:
        given = [*map(str, arguments), *(["--data", str(data)] if on_problems else [])]
        return main(["compare", str(a), str(b), *given])

    return run


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "compare.json").read_text())


def test_two_folders_and_a_reference(compare, models, tmp_path, capsys):
    assert compare(models["first"], models["second"], "--reference", models["third"]) == 0
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line.startswith(("│", "┃"))]
    assert max(map(len, table)) <= WIDTH
    for words in ("KL(A || B)", "forking", "layer 4", "final norm", "cosine with C - A"):
        assert words in printed
    folder = tmp_path / "runs" / "compare" / "first-vs-second"
    tree = read(folder)
    num_tokens = sum(len(response) + 1 for _, response in PROBLEMS)
    assert tree["tokens"]["all"]["num_tokens"] == tree["num_cka_tokens"] == num_tokens == 16
    assert tree["num_sequences"] == 4 and tree["notes"] == []
    assert [tree[name] for name in ("a", "b", "reference")] == [str(models[n]) for n in ("first", "second", "third")]
    assert tree["tokens"]["all"]["kl_ab"] > 0.1 and len(tree["cka"]) == 6
    assert [each["block"] for each in tree["displacement"]][-3:] == ["final norm", "head", "all"]
    assert all(each["cosine"] is not None for each in tree["displacement"])
    assert (folder / "compare.png").read_bytes().startswith(PNG_SIGNATURE)
    page = (folder / "compare.html").read_text()
    assert page.count("data:image/png;base64,") == 12 and "(prefers-color-scheme: dark)" in page
    # one file, without network
    assert not re.search(r"""(src|href|srcset)=["'](?!data:)""", page)
    assert (folder / "compare.json").stat().st_size < 50_000


def test_a_checkpoint_is_the_folder_that_it_is_converted_to(compare, trained, tmp_path):
    converted, checkpoint = tmp_path / "converted", trained / "checkpoints" / "step-30"
    to_hf(trained, converted, verify=False)
    assert compare(checkpoint, converted, "--limit", 3, "--cka-tokens", 4, on_problems=False) == 0
    tree = read(tmp_path / "runs" / "compare" / "trained-step-30-vs-converted")
    assert tree["a"] == str(checkpoint)
    # B has no rollouts, so they are A's
    assert tree["sources"] == [str(trained.resolve() / "rollouts" / "step-000030.jsonl")]
    assert (tree["num_sequences"], tree["num_cka_tokens"]) == (3, 4)
    assert tree["tokens"]["kl_ab"]["maximum"] < 1e-9 and tree["tokens"]["all"]["overlap"] == 1
    assert [each["moved"] for each in tree["displacement"]] == [0] * 8
    assert list(tree["cka"].values()) == [pytest.approx(1, abs=1e-12)] * 6
    # what it was written out to is gone
    assert not list(tmp_path.rglob(".hf-*"))


def test_the_text_is_what_b_sampled_before_what_a_did(trained, tmp_path):
    other = write(tmp_path / "other" / "rollouts" / "step-000007.jsonl", *RECORDS)
    a, b = (trained, trained / "checkpoints" / "step-30"), (tmp_path / "other", tmp_path / "elsewhere" / "step-9")
    options = CompareOptions("A", "B")
    assert _probe_files(options, [b, a]) == [other]
    assert _probe_files(options, [None, a]) == [trained / "rollouts" / "step-000030.jsonl"]


def test_what_does_not_compare_is_left_out_with_a_note(compare, models, tmp_path, capsys):
    # an earlier comparison is replaced
    write(tmp_path / "out" / "compare.json", {"command": "reheat compare"})
    assert compare(models["first"], models["shallow"], "--out", "out") == 0
    tree = read(tmp_path / "out")
    assert tree["cka"] is tree["displacement"] is None
    notes = ["no CKA: A has 4 layers, B 2", "no displacement: the weights of A and B have different names or shapes"]
    printed = capsys.readouterr().out
    assert tree["notes"] == notes and all(f"note: {note}" in printed for note in notes)
    assert "<h2>Layers</h2>" not in (tmp_path / "out" / "compare.html").read_text()


def test_a_reference_of_another_shape_is_left_out_with_a_note(models):
    named = {"A": "first", "B": "second", "--reference": "shallow"}
    folders = {argument: read_model(ModelConfig(hf_path=str(models[n])), chat=False) for argument, n in named.items()}
    notes: list[str] = []
    found = _displacement(folders, notes)
    assert notes == ["no cosine: the weights of A and --reference have different names or shapes"]
    assert found is not None and all(each.moved > 0 and each.cosine is None for each in found)


@pytest.mark.parametrize(
    ("b", "arguments", "message"),
    [
        ("nowhere", (), "B: {b} is no folder; name a Hugging Face folder, a run's folder or a checkpoint"),
        ("empty", (), "B: {b} has no config.json"),
        ("other words", (), "B: its tokenizer is not A's"),
        ("padded", (), "B: it has logits for 136 tokens, A for 131"),
        ("second", ("--reference", "nowhere"), "--reference: nowhere is no folder"),
        ("second", ("--limit", "0"), "--limit must be at least 1, got 0"),
        ("second", ("--cka-tokens", "1"), "--cka-tokens must be at least 2, or 0 for no CKA"),
        ("second", ("--out", "theirs"), "--out: theirs/compare.json exists and is not by reheat compare"),
        ("second", ("--out", "probe.jsonl"), "--out: probe.jsonl is not a folder"),
        ("second", ("--data", "missing.jsonl"), "--data: cannot read missing.jsonl: No such file"),
    ],
)
def test_what_is_refused(b, arguments, message, compare, models, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    theirs = write(tmp_path / "theirs" / "compare.json", {"made": "by hand"})
    folder = models.get(b, tmp_path / b)
    assert compare(models["first"], folder, *arguments, on_problems="--data" not in arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message.format(b=folder)}") and error.count("\n") == 1
    assert not (tmp_path / "runs").exists() and json.loads(theirs.read_text()) == {"made": "by hand"}


def test_without_text_it_says_where_text_comes_from(compare, models, trained, capsys):
    shutil.rmtree(trained / "rollouts")
    assert compare(models["first"], trained, on_problems=False) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --data: neither B nor A is of a run that kept rollouts") and "name a file" in error


@pytest.fixture
def reheated(models: dict[str, Path], tmp_path: Path) -> Path:
    """A run with a round of reheating, from the first model to the second, and two of which one side was not kept."""
    run = RunFolder(tmp_path / "reheated")
    for round_, side, name in (
        (1, "before", "first"),
        (1, "after", "second"),
        (2, "before", "third"),
        (3, "after", "third"),
    ):
        shutil.copytree(models[name], run.border(round_, side))
    lines = [
        {"step": 30, "stage": "rlvr", "round": 0}, {"step": 31, "stage": "reheat", "round": 1, "entropy/mean": 0.1},
        {"step": 32, "stage": "reheat", "round": 1, "entropy/mean": 0.2}, {"step": 33, "stage": "rlvr", "round": 1},
    ]  # fmt: skip
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (30, 31, 33):
        write(run.rollouts(step), *RECORDS[: step - 29])
    return run.path


def test_the_rounds_of_a_run_come_into_its_report(compare, reheated, capsys):
    assert main(["compare", str(reheated)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("page: ") == 1 and str(reheated / "report" / "round-1" / "compare.html") in printed
    tree = read(reheated / "report" / "round-1")
    assert (tree["a"], tree["b"]) == tuple(
        str(reheated / "borders" / f"round-1-{side}") for side in ("before", "after")
    )
    assert [Path(source).name for source in tree["sources"]] == ["step-000031.jsonl"]  # what was kept of the round
    assert main(["report", str(reheated)]) == 0
    page = (reheated / "report" / "report.html").read_text()
    assert "What the rounds of reheated changed" in page and f"{tree['tokens']['all']['kl_ab']:.4g}" in page
    assert page.count("<summary>round ") == 1


def test_a_run_without_borders_is_told_the_key(trained, reheated, capsys):
    assert main(["compare", str(trained)]) == 1
    assert "(checkpoint.borders); name B, too" in capsys.readouterr().err
    assert main(["compare", str(reheated), "--out", "elsewhere"]) == 1
    assert capsys.readouterr().err.startswith("error: --out: the rounds of a run are written into its report")
    shutil.rmtree(reheated / "rollouts")
    assert main(["compare", str(reheated)]) == 1
    assert "kept no rollouts of round 1 (logging.rollouts_per_step)" in capsys.readouterr().err


def test_a_damaged_comparison_is_left_out_of_the_report(reheated):
    folder = RunFolder(reheated).compared_borders(1)
    write(folder / "compare.json", {"tokens": {}})
    (folder / "compare.png").write_bytes(PNG_SIGNATURE)
    assert main(["report", str(reheated)]) == 0
    assert "What the rounds" not in (reheated / "report" / "report.html").read_text()


def test_it_is_one_process(compare, models, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert compare(models["first"], models["second"]) == 1
    assert "start it without torchrun" in capsys.readouterr().err
