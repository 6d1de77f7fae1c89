"""The README's table has a row for every method, and what the rows point at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_reheat.methods import METHODS
from megatron_reheat.recipe import load_config

ROOT = Path(__file__).resolve().parents[3]
ROW = re.compile(r"^\| \[`(\w+)`\]\((megatron_reheat/methods/[\w.]+)\) \|(.*)\|$", re.MULTILINE)
ROWS = {name: (file, rest) for name, file, rest in ROW.findall((ROOT / "README.md").read_text())}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_a_row(name: str) -> None:
    file, rest = ROWS[name]
    source = (ROOT / file).read_text()
    papers = re.findall(r"https://arxiv\.org/abs/([\d.]+)", rest)
    assert papers and all(paper in source for paper in papers)
    recipes = re.findall(r"\]\((yaml/[\w/.]+)\)", rest)
    assert len(recipes) == 2
    assert {load_config(ROOT / recipe).rl.method for recipe in recipes} == {name}
