"""Where what is for GPUs is on: gradients that are summed during the backward pass, saves and grading beside the rest."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_reheat.model.data_parallel import ddp_config
from megatron_reheat.parallel.topology import Topology
from megatron_reheat.recipe import parse_config
from tests.unit.test_config import recipe


def topology(*, on_gpu: bool, replicas: int) -> Topology:
    fields = dict.fromkeys(f.name for f in dataclasses.fields(Topology))
    device = torch.device("cuda" if on_gpu else "cpu")
    return Topology(**{**fields, "device": device, "num_replicas": replicas})  # type: ignore[arg-type]


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
    config = parse_config(recipe(parallel={"overlap_grad_reduce": setting}))
    assert ddp_config(config, topology(on_gpu=on_gpu, replicas=replicas)).overlap_grad_reduce is overlaps


@pytest.mark.parametrize(
    ("setting", "on_gpu", "on"),
    [("auto", True, True), ("auto", False, False), (True, False, True), (False, True, False)],
)
def test_what_is_for_gpus_is_on_there_or_where_asked_for(setting, on_gpu, on):
    assert topology(on_gpu=on_gpu, replicas=1).is_on(setting) is on
