"""Every recipe that ships loads and survives a dump."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_reheat.config import dump_config, load_config

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted([*(ROOT / "yaml").rglob("*.yaml"), *(ROOT / "examples").rglob("*.yaml")])


def test_there_are_recipes() -> None:
    assert {"countdown_cpu.yaml", "ts_opsd.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_loads(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    dump = tmp_path / "config.yaml"
    dump.write_text(dump_config(config))
    assert load_config(dump) == config
