"""The same network as transformers', under every layout: logits, parameter counts, weights there and back."""

from __future__ import annotations

import pytest

from tests.distributed.launch import launch
from tests.tiny_models import FAMILIES, save_tiny_model

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    root = tmp_path_factory.mktemp("parity")
    folders = {family: save_tiny_model(family, root / family) for family in FAMILIES}
    return launch("model_parity", 4, root, folders=folders, layouts=LAYOUTS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda at: f"tp{at[0]}pp{at[1]}")
def test_logits_match_transformers(ranks, layout, family):
    errors = [r[*layout, family]["logit_error"] for r in ranks if "logit_error" in r[*layout, family]]
    assert len(errors) == 4 // layout[1]  # every rank of a last stage, and no other
    assert max(errors) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda at: f"tp{at[0]}pp{at[1]}")
def test_a_further_column_is_scored_on_every_rank(ranks, layout, family):
    results = [r[*layout, family] for r in ranks]
    assert all(r["flow_lengths"] == results[0]["flow_lengths"] for r in results)
    assert max(r["flow_error"] for r in results if "flow_error" in r) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda at: f"tp{at[0]}pp{at[1]}")
def test_weights_return_bit_exact_to_replica_leaders_only(ranks, layout, family):
    results = [r[*layout, family] for r in ranks]
    leaders = [r for r in results if "bit_exact" in r]
    assert len(leaders) == 4 // (layout[0] * layout[1])
    assert all(r["bit_exact"] and r["names_equal"] for r in leaders)
    assert all(r["exported_elsewhere"] == 0 for r in results if "exported_elsewhere" in r)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_count_is_the_models(ranks, family):
    result = next(r[1, 1, family] for r in ranks if "reference_parameters" in r[1, 1, family])
    assert result["num_parameters"] == result["reference_parameters"]
