"""Recipes of this repository, read for inputs and runs that lie elsewhere than theirs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_reheat.config import Config
from megatron_reheat.recipe import load_config, merged, parse_config

ROOT = Path(__file__).resolve().parents[1]
PLACE = "runs/countdown"  # of whatever the recipes for the CPU read and write

Sections = Mapping[str, Mapping[str, Any]]


def moved(recipe: Path, place: Path, *sections: Sections) -> Config:
    """The recipe with what it reads and writes in `place`, under the same names, with `sections` on top, key by key.

    Raises:
        ConfigError: these make no sense.
    """
    tree = _moved(load_config(recipe).model_dump(mode="json"), place)
    for changes in sections:
        tree = merged(tree, changes)
    return parse_config(tree)


def _moved(value: Any, place: Path) -> Any:
    if isinstance(value, dict):
        return {key: _moved(inner, place) for key, inner in value.items()}
    if isinstance(value, list):
        return [_moved(inner, place) for inner in value]
    return f"{place}{value.removeprefix(PLACE)}" if isinstance(value, str) and value.startswith(PLACE) else value
