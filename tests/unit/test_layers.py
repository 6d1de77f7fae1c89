"""The direction of imports, read from the source: a layer sees what lies below it and nothing beside or above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "megatron_reheat"
ROOT = Path(__file__).resolve().parents[2] / PACKAGE

# The modules directly in the package (types, config, metrics, ...) are the base, but for the command line.
TOP = {"cli", "__main__"}
SIBLINGS = ("model", "losses", "rewards", "rollout", "data")
MAY_IMPORT: dict[str, set[str]] = {
    "base": set(),
    "parallel": {"base"},
    **{sibling: {"base", "parallel"} for sibling in SIBLINGS},
    "methods": {"base", "parallel", "losses", "data"},
    "analysis.passk": {"base"},
    "cluster": {"base", "model", "methods", "rewards", "stages"},
    "stages": {"base", "parallel", *SIBLINGS, "methods", "analysis.passk"},
    "commands": {"base", "cluster", "parallel", "model", "rollout", "data", "stages", "analysis", "microscope"},
    "analysis": {"base", "parallel", *SIBLINGS, "stages", "analysis.passk"},
    "microscope": {"base", "parallel", "model", "data", "analysis"},
    "evaluation": {"base", "model", "rewards", "rollout", "data", "analysis.passk"},
    "config_reference": {"base", "methods"},
    "cli": {
        "base",
        "config_reference",
        "parallel",
        *SIBLINGS,
        "stages",
        "analysis",
        "analysis.passk",
        "evaluation",
        "cluster",
        "commands",
    },
}

# Foreign module -> the layers that may import it; every other layer may not.
CONFINED = {
    "megatron": {"parallel", "model"},
    "vllm": {"rollout"},
    "torch.distributed": set(MAY_IMPORT) - {"base", "losses", "rewards", "data", "evaluation"},
}


def layer_of(module: str) -> str:
    """The layer of a dotted module inside the package, given without the package's own name."""
    head = module.partition(".")[0]
    if module == "analysis.passk" or module.startswith("analysis.passk."):
        return "analysis.passk"
    if head in TOP:
        return "cli"
    return head if head in MAY_IMPORT else "base"


def imported_names(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import, inside functions too; `from a import b` counts as a.b."""
    package = [PACKAGE, *module.split(".")] if path.name == "__init__.py" else [PACKAGE, *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{source}.{alias.name}"


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def offending_imports(root: Path) -> list[str]:
    offences = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        layer = layer_of(module)
        for line, name in imported_names(path, module):
            where = f"{path.relative_to(root)}:{line}: {layer} imports {name}"
            if is_within(name, PACKAGE):
                target = layer_of(name.removeprefix(PACKAGE).lstrip("."))
                if target != layer and target not in MAY_IMPORT[layer]:
                    offences.append(where)
            elif any(is_within(name, foreign) and layer not in allowed for foreign, allowed in CONFINED.items()):
                offences.append(where)
    return offences


def test_the_package_keeps_its_layers() -> None:
    assert len(list(ROOT.rglob("*.py"))) > 10
    assert offending_imports(ROOT) == []


def test_every_folder_is_a_known_layer() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders - set(MAY_IMPORT) == set()


@pytest.mark.parametrize(
    ("file", "source", "name"),
    [
        ("losses/a.py", "import megatron.core", "megatron.core"),
        ("losses/a.py", "import torch.distributed as dist", "torch.distributed"),
        ("losses/a.py", "from torch import distributed", "torch.distributed"),
        ("losses/a.py", "def f():\n    from megatron.core import parallel_state", "megatron.core.parallel_state"),
        ("model/a.py", "from vllm import LLM", "vllm.LLM"),
        ("stages/a.py", "from megatron import core", "megatron.core"),
        ("cli.py", "import vllm", "vllm"),
        ("model/a.py", "from megatron_reheat.rollout import wire", "megatron_reheat.rollout.wire"),
        ("model/a.py", "from megatron_reheat import rollout", "megatron_reheat.rollout"),
        ("model/a.py", "from ..rewards.pool import Pool", "megatron_reheat.rewards.pool.Pool"),
        ("model/__init__.py", "from ..data import prompts", "megatron_reheat.data.prompts"),
        ("types.py", "from megatron_reheat.parallel import cpu", "megatron_reheat.parallel.cpu"),
        ("types.py", "from .parallel import cpu", "megatron_reheat.parallel.cpu"),
        ("parallel/a.py", "import megatron_reheat.model.engine", "megatron_reheat.model.engine"),
        ("stages/a.py", "from megatron_reheat.cli import main", "megatron_reheat.cli.main"),
        ("stages/a.py", "from megatron_reheat.analysis import report", "megatron_reheat.analysis.report"),
        ("analysis/a.py", "from megatron_reheat.cli import main", "megatron_reheat.cli.main"),
        ("evaluation/a.py", "from megatron_reheat.stages import run", "megatron_reheat.stages.run"),
        ("analysis/passk.py", "from megatron_reheat.stages import run", "megatron_reheat.stages.run"),
    ],
)
def test_an_offending_import_is_caught(tmp_path: Path, file: str, source: str, name: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source + "\n")
    (offence,) = offending_imports(tmp_path)
    assert offence.startswith(f"{file}:") and offence.endswith(f" imports {name}")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("parallel/a.py", "import megatron.core"),
        ("model/a.py", "from megatron.core import parallel_state\nfrom megatron_reheat.parallel import topology"),
        ("model/a.py", "from . import hf\nfrom ..types import Prompt\nfrom megatron_reheat.model.hf import x"),
        ("rollout/a.py", "import vllm"),
        ("losses/a.py", "import torch\nfrom megatron_reheat.parallel.vocab import VocabLogits"),
        (
            "stages/a.py",
            "from megatron_reheat.analysis.passk import pass_at_k\nfrom megatron_reheat.model import engine",
        ),
        ("analysis/a.py", "from megatron_reheat.stages import run\nfrom megatron_reheat.analysis import passk"),
        ("cli.py", "from megatron_reheat.stages.run import train\nfrom megatron_reheat.analysis.report import write"),
        ("__main__.py", "from megatron_reheat.cli import main"),
        ("data/a.py", "import megatron_reheat_plugin, vllm_client"),
    ],
)
def test_allowed_imports_pass(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source + "\n")
    assert offending_imports(tmp_path) == []
