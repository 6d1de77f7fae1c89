from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_reheat.metrics import MetricSums


def sums_of(*micro_batches: tuple[float, ...]) -> MetricSums:
    sums = MetricSums()
    for values in micro_batches:
        sums.add_mean("entropy/mean", sum(values), len(values))
        sums.add_sum("tokens", len(values))
        if values:
            sums.add_max("ratio/max", max(values))
    return sums


def test_mean_weighs_items_and_not_micro_batches() -> None:
    assert sums_of((1.0,), (2.0, 3.0, 6.0)).reduced() == {
        "entropy/mean": 3.0,  # the average of the two averages would be 2.333
        "ratio/max": 6.0,
        "tokens": 4.0,
    }


def test_merged_ranks_equal_one_rank_that_saw_everything() -> None:
    ranks = [sums_of((1.0, 5.0)), sums_of((), (0.5,)), sums_of((7.0,), (2.0, 2.0))]
    together = sums_of((1.0, 5.0, 0.5, 7.0, 2.0, 2.0)).reduced()
    for order in itertools.permutations(ranks):
        merged = MetricSums()
        for rank in order:
            merged.merge(rank)
        assert merged.reduced() == pytest.approx(together)
    assert ranks[0].reduced()["entropy/mean"] == 3.0  # merging read the ranks and left them alone


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=5).map(tuple), min_size=1, max_size=5), st.randoms())
def test_order_and_grouping_do_not_matter(ranks: list[tuple[float, ...]], random) -> None:
    shuffled = list(ranks)
    random.shuffle(shuffled)
    forward = MetricSums.from_wires(sums_of(values).to_wire() for values in ranks).reduced()
    backward = MetricSums.from_wires(sums_of(values).to_wire() for values in shuffled).reduced()
    assert list(forward) == list(backward)
    assert forward == pytest.approx(backward, rel=1e-9, abs=1e-6)


def test_wire_form_survives_json_and_keeps_counts() -> None:
    wire = json.loads(json.dumps(sums_of((1.0, 2.0)).to_wire()))
    assert wire["entropy/mean"] == ["mean", 3.0, 2.0]
    merged = MetricSums.from_wires([wire, sums_of((6.0,)).to_wire()])
    assert merged.reduced()["entropy/mean"] == 3.0


def test_no_items_means_no_metric() -> None:
    empty = MetricSums()
    empty.add_mean("response/length_mean", 0.0, 0)
    assert empty.reduced() == {}
    empty.merge(MetricSums.from_wire({"response/length_mean": ["mean", 8.0, 2]}))
    assert empty.reduced() == {"response/length_mean": 4.0}


@pytest.mark.parametrize("order", [(1.0, math.nan), (math.nan, 1.0)])
def test_nan_is_never_hidden_by_the_order(order: tuple[float, float]) -> None:
    sums = MetricSums()
    for value in order:
        sums.add_max("a", value)
        sums.add_mean("c", value, 1)
    assert all(math.isnan(value) for value in sums.reduced().values())
    assert len(sums.reduced()) == 2


def test_misuse_is_refused() -> None:
    sums = sums_of((1.0, 2.0))
    with pytest.raises(ValueError, match=r"'entropy/mean' is reduced by mean and by sum"):
        sums.add_sum("entropy/mean", 1.0)
    with pytest.raises(ValueError, match=r"expected \[reduction, value, count\]"):
        MetricSums.from_wires([sums.reduced()])  # type: ignore[list-item]  # finished averages do not merge
    with pytest.raises(ValueError, match="count must be"):
        sums.add_mean("loss", 1.0, -1)
    with pytest.raises(ValueError, match="count must be"):
        sums.add_mean("loss", 1.0, math.nan)
