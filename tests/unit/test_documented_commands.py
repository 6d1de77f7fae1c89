"""Every command that the READMEs and the examples' scripts give is one that works: its GPU layout fits, its arguments parse."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.distributed import run as torchrun
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_reheat import cli
from megatron_reheat.cluster.preflight import NODE_GPUS
from megatron_reheat.model.architecture import QWEN3, Architecture, read_architecture
from megatron_reheat.recipe import load_config
from tests.character_tokenizer import character_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "examples").glob("*/README.md"))]
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
ARMS = ("ts_opsd", "control", "reverse_kl", "rollout_temperature", "data_scarce", "data_scarce_control")
# of the shell and the scheduler, or without arguments that could be wrong
OTHERS = {"source", "squeue", "tail", "scancel", "sbatch"}
# what is downloaded or made where the commands are meant to run
MODELS = {"/models/Qwen3-4B-Base": "Qwen3-4B"}


def commands_of(document: Path) -> Iterator[list[str]]:
    """The commands in a document's code blocks, as a shell splits them."""
    for block in BLOCK.findall(document.read_text()):
        if block.split()[0] not in {"reheat", "torchrun", "bash", *OTHERS}:
            continue  # a picture
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split(" && "):
                if words := shlex.split(command, comments=True):
                    yield words


def documented() -> list[tuple[str, list[str]]]:
    return [(str(d.relative_to(ROOT)), command) for d in DOCUMENTS for command in commands_of(d)]


def commands_of_script(size: str, folder: Path) -> list[list[str]]:
    """What an example's run.sh calls `reheat` with, as bash itself comes to call it."""
    calls = folder / "calls"
    for name, body in {"reheat": f'printf "%s\\0" "$@" >>{calls}; echo >>{calls}', "python": "echo 120"}.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    script = ROOT / "examples" / f"qwen3_{size}" / "run.sh"
    subprocess.run(["bash", str(script), *ARMS], env={"PATH": path}, check=True, cwd=folder)
    return [["reheat", *line.split("\0")[:-1]] for line in calls.read_text().splitlines()]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders that stand for the models that the documents name as local folders, by the name there: a configuration, a
    tokenizer, and a file of weights of the right size whose gigabytes of zeros take no space on the disk."""
    folders = {}
    for name, known in MODELS.items():
        folder = tmp_path_factory.mktemp("models")
        numbers = asdict(QWEN3[known])
        assert numbers.pop("qk_norm") and not numbers.pop("qkv_bias")
        tree = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", **numbers}
        (folder / "config.json").write_text(json.dumps(tree))
        character_tokenizer().save_pretrained(folder)
        write_zeros(folder / "model.safetensors", Qwen3Config(**tree))
        folders[name] = str(folder)
    return folders


def write_zeros(path: Path, config: Qwen3Config) -> None:
    """The model's tensors in bfloat16, all zero."""
    with torch.device("meta"):
        tensors = Qwen3ForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def layout(recipe: str, overrides: list[str], ranks: int | None) -> list[str]:
    """`reheat check` with as many GPUs as a start of the recipe would have."""
    parallel = load_config(ROOT / recipe, overrides).parallel
    gpus = ranks or parallel.tensor * parallel.pipeline * (parallel.data or 1)
    assert gpus >= NODE_GPUS, f"{recipe} {overrides} would use {gpus} of a node's GPUs"
    return ["check", recipe, *overrides, "--gpus", str(gpus), "--gpu", "h100-80g"]


def arguments_to_run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str] | None:
    """The `reheat` command that proves a documented one right here; None where parsing its arguments is all there is."""
    ranks = None
    if words[0] == "torchrun":
        launch = torchrun.parse_args(words[1:])
        assert launch.module and launch.training_script == "megatron_reheat"
        ranks, words = int(launch.nproc_per_node), ["reheat", *launch.training_script_args]
    parsed = cli._parser().parse_args(words[1:])
    command = words[1]
    if command in ("train", "serve"):
        return layout(str(parsed.config), parsed.overrides, ranks)
    if command == "slurm":
        monkeypatch.setattr(sys, "argv", words)
        return [*words[1:], *(["--dry-run"] if "--dry-run" not in words else [])]
    return words[1:] if command == "check" else None


def prove(words: list[str], models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, folder in models.items():
        words = [word.replace(name, folder) for word in words]
    arguments = arguments_to_run(words, monkeypatch)
    monkeypatch.chdir(ROOT)
    assert arguments is None or cli.main(arguments) == 0


@pytest.mark.parametrize(
    ("document", "words"), documented(), ids=lambda value: value if isinstance(value, str) else shlex.join(value)[:90]
)
def test_a_documented_command_works(
    document: str, words: list[str], models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file() or words[1].startswith("runs/"), f"{document} names {words[1]}"
    elif words[0] not in OTHERS:
        assert words[0] in ("reheat", "torchrun"), f"{document}: how is {words[0]} to be tested?"
        prove(words, models, monkeypatch)


@pytest.mark.parametrize("size", ["4b", "8b"])
def test_what_an_example_script_runs_works(
    size: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = commands_of_script(size, tmp_path)
    trained = [Path(words[2]).name for words in commands if words[1] == "train"]
    assert trained == [f"qwen3_{size}_{arm}.yaml" for arm in ("trunk", *ARMS)]
    for words in commands:
        prove(words, models, monkeypatch)


def test_there_are_commands_to_test() -> None:
    kinds = {words[1] for _, words in documented() if words[0] == "reheat"}
    assert kinds >= {"train", "check", "slurm", "serve", "eval", "compare", "convert", "report", "doctor"}
    assert any(words[0] == "torchrun" for _, words in documented())


def test_a_folder_stands_for_the_model_it_is_named_after(models: dict[str, str]) -> None:
    for name, known in MODELS.items():
        model = load_config(ROOT / "yaml" / "ts_opsd.yaml", [f"model.hf_path={models[name]}"]).model
        assert read_architecture(model) == Architecture(**asdict(QWEN3[known]))
