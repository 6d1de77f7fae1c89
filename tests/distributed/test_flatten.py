"""Exact flattening under every layout: logits over T to rounding, master weights too, and the entropy that was asked for."""

from __future__ import annotations

import pytest

from tests.distributed.launch import launch
from tests.tiny_models import save_tiny_model

LAYOUTS = [
    {"tensor": 2},
    {"tensor": 2, "sequence_parallel": True},
    {"pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"data": 2},
    {"data": 2, "fused_head": False},
    {"data": 2, "dtype": "bfloat16"},
    {"data": 2, "dtype": "bfloat16", "distributed_optimizer": False},
]


@pytest.fixture(scope="module", params=["qwen3_tied", "qwen3_untied"])
def ranks(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("flatten")
    folder = save_tiny_model(request.param, root / "m")
    return launch("flattenings", 2, root, folder=folder, layouts=LAYOUTS)


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=lambda index: str(LAYOUTS[index]))
def test_logits_are_divided_and_stay_so(ranks, index):
    rounding = (
        0.1 if LAYOUTS[index].get("dtype") else 1e-4
    )  # bfloat16 rounds the norm's weight and the hidden states anew
    for rank in ranks:
        result = rank[index]
        assert result["gap"] <= rounding < 0.5 < result["moved"]
        assert (
            result["stepped"] and result["drift"] <= rounding + 2e-3
        )  # a small step starts from them: they are the master weights
        assert result["norm_is_back"]


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=lambda index: str(LAYOUTS[index]))
def test_the_entropy_is_what_was_asked_for(ranks, index):
    for rank in ranks:
        result = rank[index]
        temperature, before, after = result["flattened"]
        assert 1.1 < temperature < 1.6 and before == pytest.approx(
            result["cold"], rel=1e-3
        )  # but for the step in between
        assert after == pytest.approx(result["target"], rel=0.006) and before < after
        assert result["entropy"] == pytest.approx(after, rel=1e-6)  # the weights are left as they were measured
        assert result["published"] == [5]
    assert ranks[0][index]["flattened"] == ranks[1][index]["flattened"]
