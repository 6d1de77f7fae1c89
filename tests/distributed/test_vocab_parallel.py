"""Values AND gradients of the vocabulary losses at TP = 1, 2 and 4 against the dense float64 reference."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.launch import launch

GRADIENT_TOLERANCE = {"torch.float32": 1e-5, "torch.bfloat16": 4e-3}
# 101 leaves padding at TP = 2 and 4; 5 leaves a shard of padding only at TP = 4
VOCAB_SIZES = (101, 5)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return launch("vocab_parallel", 4, tmp_path_factory.mktemp("vocab"), num_tokens=7, vocab_sizes=VOCAB_SIZES)


@pytest.fixture(params=VOCAB_SIZES)
def ranks(request, job):
    return [rank[request.param] for rank in job]


def test_values_and_gradients_match_the_dense_reference(ranks):
    checked = 0
    for rank, result in enumerate(ranks):
        for (tensor_size, case, dtype), errors in result["errors"].items():
            for name, error in errors.items():
                # a KL is second order in 1 - 1/T: float32 exponentials leave fewer digits of it
                limit = GRADIENT_TOLERANCE[dtype] if "gradient" in name else 1e-4 if name.endswith("kl") else 2e-6
                assert error <= limit, (rank, tensor_size, case, dtype, name, error)
                checked += 1
    assert checked == 4 * 3 * 5 * 2 * (2 * 5 * 4 + 3 * 2 + 2 * 6 * 2 + 1)


def test_a_loss_of_several_hidden_states_matches_the_dense_reference(ranks):
    for rank, result in enumerate(ranks):
        assert list(result["head"]) == [1, 2, 4]
        for tensor_size, errors in result["head"].items():
            assert len(errors) == 4
            for name, error in errors.items():
                assert error < 1e-5, (rank, tensor_size, name, error)


def test_every_rank_of_a_group_gets_bitwise_the_same_values(ranks):
    for key in ranks[0]["values"]:
        tensor_size = key[0]
        for first in range(0, 4, tensor_size):
            for other in range(first + 1, first + tensor_size):
                for a, b in zip(ranks[first]["values"][key], ranks[other]["values"][key], strict=True):
                    assert torch.equal(a, b), (key, first, other)
