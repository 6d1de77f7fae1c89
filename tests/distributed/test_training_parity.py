"""Five training steps give the same losses, gradient norms and weights under every layout and micro-batch size."""

from __future__ import annotations

import pytest

from tests.distributed.launch import launch
from tests.tiny_models import save_tiny_model

RUNS = {
    1: [
        {"microbatch_tokens": 48},
        {"microbatch_tokens": 4096},
        {"distributed_optimizer": False},
        {"recompute": "full"},
        {"recompute": "selective"},
        {"fused_head": False},
        {"head_chunk_tokens": 7},
    ],
    2: [
        {"tensor": 2},
        {"tensor": 2, "sequence_parallel": True},
        {"tensor": 2, "sequence_parallel": True, "fused_head": False},
        {"pipeline": 2},
        {"data": 2},
        {"data": 2, "distributed_optimizer": False, "microbatch_tokens": 48},
    ],
    4: [
        {"tensor": 2, "pipeline": 2},
        {"tensor": 2, "pipeline": 2, "sequence_parallel": True, "microbatch_tokens": 48},
        {"tensor": 4},
        {"pipeline": 2, "data": 2},
    ],
}


@pytest.fixture(scope="module", params=["qwen3_tied", "qwen3_untied"])
def family(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    folder = save_tiny_model(request.param, root / "model")
    (reference,) = launch("train_five_steps", 1, root, folder=folder, runs=[{}, *RUNS[1]])
    return root, folder, reference[0], reference[1:]


@pytest.mark.parametrize("world_size", RUNS)
def test_training_does_not_depend_on_the_layout(family, world_size):
    root, folder, reference, single = family
    runs = (
        single
        if world_size == 1
        else launch("train_five_steps", world_size, root, folder=folder, runs=RUNS[world_size])[0]
    )
    assert len(runs) == len(RUNS[world_size])
    for run in runs:
        for step, (metrics, expected) in enumerate(zip(run["metrics"], reference["metrics"], strict=True)):
            assert set(metrics) == set(expected)
            for name, value in expected.items():
                if "non_finite" not in name:
                    assert metrics[name] == pytest.approx(value, rel=1e-5, abs=2e-7), (run["layout"], step, name)
        assert set(run["weights"]) == set(reference["weights"])
        for name, expected in reference["weights"].items():
            error = ((run["weights"][name] - expected).norm() / expected.norm()).item()
            assert error <= 1e-5, (run["layout"], name, error)


def test_sequence_mean_differs_from_token_mean_and_agrees_across_data_parallelism(family, tmp_path):
    _, folder, reference, _ = family
    (alone,) = launch("train_five_steps", 1, tmp_path, folder=folder, runs=[{"aggregation": "sequence_mean"}])
    split = launch("train_five_steps", 2, tmp_path, folder=folder, runs=[{"aggregation": "sequence_mean", "data": 2}])[
        0
    ]
    loss = next(metrics.get("policy/loss") for metrics in alone[0]["metrics"])
    assert loss != pytest.approx(reference["metrics"][0]["policy/loss"], rel=1e-3)
    assert split[0]["metrics"][0]["policy/loss"] == pytest.approx(loss, rel=1e-5)
    assert split[0]["metrics"][4]["sft/loss"] == pytest.approx(alone[0]["metrics"][4]["sft/loss"], rel=1e-5)
