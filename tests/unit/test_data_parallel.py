"""Where gradients are summed during the backward pass."""

from __future__ import annotations

import pytest

from megatron_reheat.model.data_parallel import overlaps_grad_reduce


@pytest.mark.parametrize(
    ("setting", "on_gpu", "replicas", "overlaps"),
    [
        ("auto", True, 2, True),
        ("auto", False, 2, False),
        (True, False, 2, True),
        (False, True, 2, False),
        ("auto", True, 1, False),
        (True, True, 1, False),
    ],
)
def test_gradients_are_summed_early_on_gpus_or_where_asked_for(setting, on_gpu, replicas, overlaps):
    assert overlaps_grad_reduce(setting, on_gpu=on_gpu, replicas=replicas) is overlaps
