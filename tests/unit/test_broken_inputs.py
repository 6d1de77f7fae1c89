"""A tenth of the broken recipes and model folders of scripts/faults, and what of the rest needs a closer look."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_reheat.config import ModelConfig
from megatron_reheat.data.apart import Failed, OverLimit, run_apart
from megatron_reheat.errors import ConfigError, printable
from megatron_reheat.files import problem_of_file, problem_of_folder
from megatron_reheat.model import provider
from megatron_reheat.recipe import load_config
from megatron_reheat.run_folder import RunFolder
from tests.e2e.runs import ROOT

GOOD = "model: {hf_path: m}\ndata: {path: p.jsonl}\n"


@pytest.mark.slow
def test_every_tenth_is_refused_in_one_sentence() -> None:
    """In a process of its own, which forks for each of them."""
    command = [sys.executable, "-W", "ignore", "-m", "scripts.faults.broken_inputs", "--every", "10"]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    total = next(line.split() for line in done.stdout.splitlines() if line.startswith("all "))
    assert int(total[1]) > 100 and total[-1] == "0"  # none of them ran code


def refused(folder: Path, text: str, *overrides: str) -> str:
    (folder / "r.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(folder / "r.yaml", overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rl: {group_size: 4, group_size: 8}\n", "line 3: rl.group_size is given a second time, first in line 3"),
        ("logging: &a {b: *a}\n", "found unconstructable recursive node"),
        ("run: {seed: 0x" + "f" * 5000 + "}\n", "run.seed: "),
    ],
)
def test_what_yaml_itself_lets_pass(tmp_path: Path, text: str, words: str) -> None:
    assert words in refused(tmp_path, GOOD + text)


def test_aliases_are_counted_for_what_they_stand_for(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    started = time.process_time()
    assert "a4 stands for more than 100,000 values" in refused(tmp_path, GOOD + "\n".join(lines) + "\n")
    assert time.process_time() - started < 2
    shared = "base_options: &o {a: 1}\n"
    assert "base_options: unknown key" in refused(tmp_path, GOOD + shared + "eval: {data: {path: q, options: *o}}\n")


@pytest.mark.parametrize(
    "value", ["{a: !!int x}", "{a: !!bool x}", "{a: " + "9" * 30 + "}", "{a: 0x" + "f" * 5000 + "}"]
)
def test_values_that_are_passed_on_are_values(tmp_path: Path, value: str) -> None:
    for message in (
        refused(tmp_path, GOOD, f"data.options={value}"),
        refused(tmp_path, f"model: {{hf_path: m}}\ndata: {{path: p, options: {value}}}\n"),
    ):
        assert "holds a value that cannot be read" in message and len(message) < 400


def test_a_message_is_one_line_that_moves_no_cursor() -> None:
    assert str(ConfigError("a\nb\x1b[2J\ud800\u202e")) == r"a\nb\x1b[2J\ud800\u202e"
    assert printable("a\nb\t", keep="\n") == "a\nb\\t"


@pytest.mark.parametrize("name", ["..", ".", "../x", "a/../..", "/x", " ", "a\nb"])
def test_a_run_stays_below_its_folder(tmp_path: Path, name: str) -> None:
    assert refused(tmp_path, GOOD, f"run.name={name}").startswith("run.name: ")
    (tmp_path / "r.yaml").write_text(GOOD)
    assert load_config(tmp_path / "r.yaml", ["run.name=seed-0/trunk"]).run.path == Path("runs/seed-0/trunk")


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("xx")
    for name, words in {
        "pipe": "it is a pipe; name a file", "loop": "Too many levels of symbolic links", "": "Is a directory",
        "none": "No such file or directory", "file/a": "Not a directory", "n" * 300: "File name too long",
        "a\0": "no file has such a name",
    }.items():  # fmt: skip
        assert words in (problem_of_file(tmp_path / name) or "")
    assert "it is a device" in (problem_of_file(Path("/dev/zero")) or "")
    assert problem_of_file(tmp_path / "file") is None and problem_of_folder(tmp_path) is None
    assert "it has 2 bytes, and 1 are the most" in (problem_of_file(tmp_path / "file", 1) or "")


def test_a_run_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    RunFolder(tmp_path / "a" / "b").check()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "a", Path("/proc/none")):
        with pytest.raises(ConfigError, match=r"run\.folder: cannot write run folder .*; change run\.folder"):
            RunFolder(path).check()


# -- programs of others ------------------------------------------------------------------------------------------------


def test_a_loop_and_a_bomb_end_and_an_error_comes_back() -> None:
    assert run_apart(lambda: "é\ud800" + "x" * 300_000) == "é\ud800" + "x" * 300_000
    with pytest.raises(Failed, match="two lines"):
        run_apart(lambda: (_ for _ in ()).throw(ValueError("two\nlines")))

    def loop() -> str:
        while True:
            pass

    for endless in (loop, lambda: str(9 ** (9**9))):  # in Python, and in C, where no signal's handler would run
        with pytest.raises(OverLimit, match="does not end within 1 s"):
            run_apart(endless)
    with pytest.raises(OverLimit, match="needs more than 1 GiB"):
        run_apart(lambda: "x" * 2**33)


# -- the hub -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "http://no.such.host.invalid"])
def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(provider, "getproxies", dict)
    started = time.monotonic()
    with pytest.raises(
        ConfigError, match=r"model\.hf_path: runs/modle is neither .* \(the hub does not answer\); correct"
    ):
        provider.resolve_hf_folder(ModelConfig(hf_path="runs/modle"))
    assert time.monotonic() - started < 10
