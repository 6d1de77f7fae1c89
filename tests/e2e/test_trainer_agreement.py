"""vLLM holds the trainer's own policy after every sync: greedy tokens and log-probabilities, at TP = 1, TP = 2 and PP = 2."""

from __future__ import annotations

import pytest

from tests.distributed.launch import launch
from tests.tiny_models import save_tiny_model


@pytest.mark.parametrize(("world_size", "layout"), [(1, {}), (2, {"tensor": 2}), (2, {"pipeline": 2})], ids=str)
def test_greedy_tokens_and_logprobs_equal_the_trainers(tmp_path, world_size, layout):
    folder = save_tiny_model("qwen3_tied", tmp_path / "model")
    ranks = launch("sampler_agreement", world_size, tmp_path, folder=folder, log_folder=tmp_path, **layout)
    for rank in ranks:
        assert [r["versions"] for r in rank] == [{1}, {2}]
        for result in rank:
            assert all(result["argmax_equal"])
            assert result["logprob_gap"] <= 1e-3
        assert rank[0]["tokens"] != rank[1]["tokens"]  # the second sync changed the policy
    assert any(result["argmax_equal"] for rank in ranks for result in rank)  # compared on a last stage at least once
