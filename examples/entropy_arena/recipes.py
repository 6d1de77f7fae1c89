"""The recipes of yaml/methods for the CPU, read for inputs that lie elsewhere than theirs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_reheat.config import Config
from megatron_reheat.recipe import load_config, parse_config

ROOT = Path(__file__).resolve().parents[2]
# those for GPUs have their model in their name
RECIPES = {path.stem: path for path in sorted((ROOT / "yaml" / "methods").glob("*.yaml")) if "_qwen3_" not in path.stem}
PLACE = "runs/countdown"  # of whatever they read and write

Sections = Mapping[str, Mapping[str, Any]]


def moved(name: str, place: Path, *sections: Sections) -> Config:
    """The recipe with what it reads and writes in `place`, under the same names, joined key by key with `sections`.

    Raises:
        ConfigError: these make no sense.
    """
    tree = _moved(load_config(RECIPES[name]).model_dump(mode="json"), place)
    for changes in sections:
        tree = _joined(tree, changes)
    return parse_config(tree)


def _joined(tree: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    joined = dict(tree)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(tree.get(key), dict)
        joined[key] = _joined(tree[key], value) if both else value
    return joined


def _moved(value: Any, place: Path) -> Any:
    if isinstance(value, dict):
        return {key: _moved(inner, place) for key, inner in value.items()}
    if isinstance(value, list):
        return [_moved(inner, place) for inner in value]
    return f"{place}{value.removeprefix(PLACE)}" if isinstance(value, str) and value.startswith(PLACE) else value
