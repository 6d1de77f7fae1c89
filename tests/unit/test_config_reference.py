"""The keys' reference beside the recipes is current and complete, and the schema takes the recipes and no typos."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from megatron_reheat import cli, config_reference

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "yaml").rglob("*.yaml"))


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return config_reference.files()


def test_the_files_beside_the_recipes_are_current(made: dict[str, str]) -> None:
    """If not: python -m megatron_reheat.config_reference yaml"""
    assert {name: (ROOT / "yaml" / name).read_text() for name in made} == made


def test_every_key_says_what_it_means() -> None:
    tables = itertools.chain.from_iterable(map(config_reference.tables, config_reference.sections()))
    found = [row for _, rows in tables for row in rows]
    assert len(found) > 130 and [row.key for row in found if not row.meaning] == []


def test_the_schema_takes_every_recipe_and_refuses_a_typo(made: dict[str, str]) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(made[config_reference.SCHEMA]))
    for recipe in RECIPES:
        first, tree = recipe.read_text().splitlines()[0], yaml.safe_load(recipe.read_text())
        assert (recipe.parent / first.partition("$schema=")[2]).resolve() == ROOT / "yaml" / config_reference.SCHEMA
        assert [error.message for error in validator.iter_errors(tree)] == [], recipe
    for wrong in (
        {"rl": {"group_sise": 8}},
        {"rl": {"group_size": "many"}},
        {"model": {"dtype": "float16"}},
        {"lr": 1},
    ):
        assert not validator.is_valid(wrong), wrong


def test_the_command_prints_a_section_and_names_them_if_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "rl"]) == 0
    output = capsys.readouterr().out
    lines = [line.split() for line in output.splitlines()]
    assert ["rl"] in lines and ["rl.options", "of", "sdpg"] in lines and ["rollout"] not in lines
    assert {"group_size", "anchor"} <= {words[0] for words in lines if words}
    assert cli.main(["config", "rll"]) == 1
    assert "no section 'rll'; there are model, data, parallel" in capsys.readouterr().err
