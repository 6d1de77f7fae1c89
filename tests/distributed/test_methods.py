"""The losses of SDPG and OISD through their classes: equal to transformers in float64, and the same under every layout."""

from __future__ import annotations

from functools import cache

import pytest

from tests.distributed.launch import launch
from tests.distributed.method_cases import DenseOISD, DenseSDPG
from tests.tiny_models import save_tiny_model

ONE_STAGE = {"tensor": 2, "sequence_parallel": True}
INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}
# by number of processes: method, its changed options and the layout; the first of each method and options is the reference
RUNS = {
    1: [
        ("sdpg", {}, {}),
        ("sdpg", {}, {"microbatch_tokens": 48, "head_chunk_tokens": 7}),
        ("sdpg", {"importance_weighted": False}, {}),
        ("oisd", {}, {}),
        ("oisd", {}, {"microbatch_tokens": 48, "head_chunk_tokens": 7}),
        ("oisd", {}, {"recompute": "selective"}),
        ("oisd", {"think_coef": 0.0}, {}),
        ("oisd", {"attention_coef": 0.0}, {}),
        ("oisd", {"attention_coef": 0.0}, {"recompute": "full", "microbatch_tokens": 48}),
    ],
    2: [
        *(
            (m, {}, layout)
            for m in ("sdpg", "oisd")
            for layout in ({"tensor": 2}, ONE_STAGE, {"pipeline": 2}, INTERLEAVED, {"data": 2})
        ),
        ("sdpg", {}, {"context": 2, "microbatch_tokens": 48}),
        ("oisd", {"attention_coef": 0.0}, {"context": 2}),
    ],
    4: [
        ("sdpg", {}, {**ONE_STAGE, "pipeline": 2}),
        ("oisd", {}, {**ONE_STAGE, "pipeline": 2}),
        ("oisd", {}, {"pipeline": 4, "recompute": "selective"}),
        ("oisd", {"think_coef": 0.0}, {"tensor": 2, "pipeline": 2, "microbatch_tokens": 48}),
        ("oisd", {"attention_coef": 0.0}, {**ONE_STAGE, "pipeline": 2, "recompute": "full"}),
    ],
}  # fmt: skip
DENSE = {"sdpg": DenseSDPG, "oisd": DenseOISD}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model("qwen3_untied", tmp_path_factory.mktemp("models") / "qwen3")


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    @cache
    def train(world_size):
        runs = [(folder, *run) for run in RUNS[world_size]]
        return launch("method_cases.train_with_methods", world_size, tmp_path_factory.mktemp("job"), runs=runs)[0]

    return train


def reference(trained, method, options):
    return next(
        run for run, (m, o, _) in zip(trained(1), RUNS[1], strict=True) if (m, o) == (method, options)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sdpg", {}),
        ("sdpg", {"importance_weighted": False}),
        ("oisd", {}),
        ("oisd", {"think_coef": 0.0}),
        ("oisd", {"attention_coef": 0.0}),
    ],
)
def test_loss_and_gradient_are_those_of_transformers_in_float64(trained, folder, method, options):
    metrics = reference(trained, method, options)["metrics"][0]
    expected = DENSE[method](folder, **options).metrics()
    assert {n for n in metrics if n.startswith(method)} - {"sdpg/clamped_fraction"} == {
        n for n in expected if n.startswith(method)
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=2e-5, abs=1e-7), name


@pytest.mark.parametrize("world_size", RUNS)
def test_training_does_not_depend_on_the_layout(trained, world_size):
    for (method, options, layout), run in zip(RUNS[world_size], trained(world_size), strict=True):
        expected = reference(trained, method, options)
        for step, (metrics, values) in enumerate(zip(run["metrics"], expected["metrics"], strict=True)):
            assert set(metrics) == set(values)
            for name, value in values.items():
                assert metrics[name] == pytest.approx(value, rel=1e-5, abs=2e-7), (method, options, layout, step, name)
        assert set(run["weights"]) == set(expected["weights"])
        for name, weight in expected["weights"].items():
            error = ((run["weights"][name] - weight).norm() / weight.norm()).item()
            assert error <= 1e-5, (method, options, layout, name, error)
