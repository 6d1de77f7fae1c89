"""Runs in turn on the same engines: what cannot share them is refused before anything is started."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_reheat.config import Config
from megatron_reheat.errors import ConfigError
from megatron_reheat.recipe import parse_config
from megatron_reheat.stages import series
from megatron_reheat.stages.series import RunSeries


def recipe(**sections: Any) -> Config:
    return parse_config({"model": {"hf_path": "m"}, "data": {"path": "p"}, **sections})


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> RunSeries:
    monkeypatch.setattr(series.parallel_topology, "initialize", lambda config: SimpleNamespace(is_main=True))
    return RunSeries(recipe(run={"name": "first"}))


@pytest.mark.parametrize(
    "changes",
    [{"parallel": {"microbatch_tokens": 20000}}, {"rollout": {"max_num_seqs": 8}}, {"reward": {"workers": 3}}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_recipe_that_needs_other_helpers_is_refused(made: RunSeries, changes: dict[str, Any]) -> None:
    (section,) = changes
    with pytest.raises(ConfigError) as caught, made.run(recipe(run={"name": "other"}, **changes)):
        pass
    assert str(caught.value) == (
        f"{section}: other differs from first, and runs in a series share their layout, engines and verifiers; "
        "train it by itself"
    )


def test_longer_sequences_than_the_engines_hold_are_refused(made: RunSeries) -> None:
    made._helpers, made._max_model_len = SimpleNamespace(), 100
    assert made._share(SimpleNamespace(max_model_len=100)) is made._helpers
    with pytest.raises(ConfigError, match=r"up to 101 tokens, .* hold 100; set rollout\.max_model_len=101 in all"):
        made._share(SimpleNamespace(max_model_len=101))
