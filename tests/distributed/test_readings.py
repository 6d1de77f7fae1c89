"""Losses over several predictions of the same tokens: equal to transformers in float64, and the same under every layout."""

from __future__ import annotations

from functools import cache

import pytest

from tests.distributed.launch import launch
from tests.distributed.reading_cases import dense_first_step, dense_step_by_frozen_teacher
from tests.tiny_models import save_tiny_model

TAPS = {"qwen3_tied": (1, 3), "qwen3_untied": (2,)}  # of four layers; with two stages, of both or on a border
INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}
RUNS = {
    1: [
        {},
        {"microbatch_tokens": 48},
        {"microbatch_tokens": 4096},
        {"head_chunk_tokens": 7},
        {"recompute": "selective"},
        {"recompute": "full"},
    ],
    2: [
        {"tensor": 2},
        {"tensor": 2, "sequence_parallel": True},
        {"pipeline": 2},
        INTERLEAVED,
        {"data": 2},
        {"context": 2},
    ],
    4: [
        {"context": 2, "pipeline": 2, "microbatch_tokens": 48},
        {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
        {"pipeline": 4},
        {"tensor": 2, "sequence_parallel": True, **INTERLEAVED},
        {"pipeline": 2, "data": 2, "microbatch_tokens": 48},
        {"tensor": 4},
    ],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny_model(family, root / family) for family in TAPS}


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    @cache
    def train(world_size):
        runs = [(folders[family], TAPS[family], layout) for family in TAPS for layout in RUNS[world_size]]
        results = launch("reading_cases.train_with_readings", world_size, tmp_path_factory.mktemp("job"), runs=runs)[0]
        count = len(RUNS[world_size])
        return {family: results[i * count : (i + 1) * count] for i, family in enumerate(TAPS)}

    return train


@pytest.mark.parametrize("family", TAPS)
def test_loss_and_gradient_are_those_of_transformers_in_float64(trained, folders, family):
    metrics = trained(1)[family][0]["metrics"][0]
    for name, value in dense_first_step(folders[family], TAPS[family]).items():
        assert metrics[name] == pytest.approx(value, rel=2e-5), name
    assert metrics["twin/kl"] < 1e-9  # a view that reads the same prompt predicts the same


@pytest.mark.parametrize("world_size", RUNS)
@pytest.mark.parametrize("family", TAPS)
def test_training_does_not_depend_on_the_layout(trained, family, world_size):
    reference = trained(1)[family][0]
    runs = trained(world_size)[family]
    assert [run["layout"] for run in runs] == RUNS[world_size]
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


FROZEN = {
    1: [{}, {"head_chunk_tokens": 7, "microbatch_tokens": 48}],
    2: [{"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}, {"data": 2}, {"context": 2}],
    4: [{"tensor": 4}, {"tensor": 2, **INTERLEAVED}],
}
DIRECTIONS = {"qwen3_tied": "forward", "qwen3_untied": "reverse"}


@pytest.fixture(scope="module")
def taught(folders, tmp_path_factory):
    """Steps towards a frozen teacher, whose head is tied to its embedding or is not."""

    @cache
    def train(world_size):
        layouts = FROZEN[world_size]
        runs = [(folders[family], direction, layout) for family, direction in DIRECTIONS.items() for layout in layouts]
        place = tmp_path_factory.mktemp("job")
        results = launch("reading_cases.train_by_frozen_teacher", world_size, place, runs=runs)[0]
        return {family: results[i * len(layouts) : (i + 1) * len(layouts)] for i, family in enumerate(DIRECTIONS)}

    return train


@pytest.mark.parametrize("family", DIRECTIONS)
def test_a_frozen_teachers_loss_and_gradient_are_those_of_transformers_in_float64(taught, folders, family):
    run = taught(1)[family][0]
    assert any((run["moved"][name] != weight).any() for name, weight in run["weights"].items())
    for name, value in dense_step_by_frozen_teacher(folders[family], DIRECTIONS[family], run["moved"]).items():
        assert run["metrics"][0][name] == pytest.approx(value, rel=2e-5), name


@pytest.mark.parametrize("world_size", FROZEN)
@pytest.mark.parametrize("family", DIRECTIONS)
def test_what_a_frozen_teacher_teaches_does_not_depend_on_the_layout(taught, family, world_size):
    reference = taught(1)[family][0]
    for run in taught(world_size)[family]:
        for metrics, expected in zip(run["metrics"], reference["metrics"], strict=True):
            for name in ("reheat/kl", "reheat/teacher_entropy", "entropy/mean", "optimizer/grad_norm"):
                assert metrics[name] == pytest.approx(expected[name], rel=1e-5, abs=2e-7), (run["layout"], name)
        for name, expected in reference["weights"].items():
            error = ((run["weights"][name] - expected).norm() / expected.norm()).item()
            assert error <= 1e-5, (run["layout"], name, error)
