"""A loss over whole sequences: the same loss, gradient and step under every layout, and as transformers in float64."""

from __future__ import annotations

import pytest

from tests.distributed.launch import launch
from tests.distributed.scored_in_update import check_same_update
from tests.tiny_models import save_tiny_model

LAYOUTS = [
    {"tensor": 2, "sequence_parallel": True},
    {"pipeline": 2, "microbatch_tokens": 48},
    {"pipeline": 2, "virtual_pipeline": 2, "microbatch_tokens": 48},
    {"data": 2, "microbatch_tokens": 48, "head_chunk_tokens": 7},
    {"data": 2, "distributed_optimizer": False},
    {"tensor": 2, "fused_head": False},
    {"context": 2, "microbatch_tokens": 48},
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("sequence-loss")
    folder = save_tiny_model("qwen3_tied", root / "m")
    return launch("sequence_losses", 2, root, folder=folder, layouts=LAYOUTS)


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=lambda index: str(LAYOUTS[index]))
def test_gspo_is_the_dense_sequence_form(results, index):
    dense = results[0]["dense"]
    assert 0 < dense["clipped"] < 12
    for rank in results:
        metrics = rank["ours"][index]["metrics"]
        assert metrics["policy/loss"] == pytest.approx(dense["loss"], rel=1e-5)
        assert metrics["optimizer/grad_norm"] == pytest.approx(dense["norm"], rel=1e-4)
        assert metrics == pytest.approx(results[0]["ours"][0]["metrics"], rel=1e-5, abs=2e-7)
    check_same_update(results[0]["ours"][index]["alone"], exact=LAYOUTS[index].get("fused_head", True))
    assert 0 < results[0]["ours"][index]["alone"][1][1]["policy/tis_truncated_fraction"] < 1
    weights = results[0]["ours"][index]["weights"]
    assert weights
    for name, ours in weights.items():
        step = dense["after"][name] - dense["before"][name]
        error = ((ours.double() - dense["before"][name] - step).norm() / step.norm()).item()
        assert error < 2e-3, (name, error)
