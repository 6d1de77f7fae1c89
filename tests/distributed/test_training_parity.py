"""Five training steps give the same losses, gradient norms and weights under every layout and micro-batch size."""

from __future__ import annotations

from functools import cache

import pytest

from tests.distributed.launch import launch
from tests.distributed.scored_in_update import check_same_update
from tests.tiny_models import save_tiny_model

INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}
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
        INTERLEAVED,
        {**INTERLEAVED, "microbatch_tokens": 48, "fused_head": False},
        {"data": 2},
        {"data": 2, "distributed_optimizer": False, "microbatch_tokens": 48},
        {"context": 2},
        {"context": 2, "microbatch_tokens": 48, "recompute": "selective", "distributed_optimizer": False},
        {"context": 2, "fused_head": False},
    ],
    4: [
        {"tensor": 2, "pipeline": 2},
        {"tensor": 2, "pipeline": 2, "sequence_parallel": True, "microbatch_tokens": 48},
        {"tensor": 2, "sequence_parallel": True, **INTERLEAVED},
        {"tensor": 4},
        {"pipeline": 2, "data": 2},
        {"context": 2, "tensor": 2, "sequence_parallel": True},
        {"context": 2, "pipeline": 2, "microbatch_tokens": 48},
        {"context": 2, "data": 2},
        {"context": 4, "recompute": "full"},
    ],
}
FAMILIES = ("qwen3_tied", "qwen3_untied")
# trained along with RUNS, but of another aggregation
REFERENCE, ALONE, SPLIT = {}, {"aggregation": "sequence_mean"}, {"aggregation": "sequence_mean", "data": 2}
OTHERS = {1: [REFERENCE, ALONE], 2: [SPLIT], 4: []}
# of a model with twice as many layers: a pipeline whose neighbours are two ranks, chunks of more than one layer
DEEP = {
    1: [REFERENCE],
    2: [],
    4: [
        {"pipeline": 4, "virtual_pipeline": 2, "microbatch_tokens": 48},
        {**INTERLEAVED, "data": 2, "recompute": "full"},
    ],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """world size -> family -> the results of OTHERS, then of RUNS, and "deep" -> those of DEEP; one job a world size, as a
    start costs more than a run."""
    root = tmp_path_factory.mktemp("training")
    folders = {family: save_tiny_model(family, root / family) for family in FAMILIES}
    deep = save_tiny_model("qwen3_tied", root / "deep", num_hidden_layers=8)

    @cache
    def train(world_size):
        layouts = [*OTHERS[world_size], *RUNS[world_size]]
        runs = [(folder, layout) for folder in folders.values() for layout in layouts]
        runs += [(deep, layout) for layout in DEEP[world_size]]
        scratch = tmp_path_factory.mktemp("job")
        results = launch("train_five_steps", world_size, scratch, runs=runs)[0]
        count = len(layouts)
        parts = results[:count], results[count : 2 * count], results[2 * count :]
        return dict(zip((*FAMILIES, "deep"), parts, strict=True))

    return train


@pytest.mark.parametrize("world_size", RUNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_does_not_depend_on_the_layout(trained, family, world_size):
    reference = trained(1)[family][0]
    assert reference["layout"] == REFERENCE
    runs = trained(world_size)[family][len(OTHERS[world_size]) :]
    assert [run["layout"] for run in runs] == RUNS[world_size]
    for run in runs:
        check_same_training(run, reference)


def test_training_of_a_deep_model_does_not_depend_on_how_its_layers_are_cut(trained):
    (reference,), runs = trained(1)["deep"], trained(4)["deep"]
    assert [run["layout"] for run in runs] == DEEP[4]
    for run in runs:
        check_same_training(run, reference)


def check_same_training(run, reference):
    for step, (metrics, expected) in enumerate(zip(run["metrics"], reference["metrics"], strict=True)):
        assert set(metrics) == set(expected)
        for name, value in expected.items():
            if "non_finite" not in name:
                assert metrics[name] == pytest.approx(value, rel=1e-5, abs=2e-7), (run["layout"], step, name)
    assert set(run["weights"]) == set(reference["weights"])
    for name, expected in reference["weights"].items():
        error = ((run["weights"][name] - expected).norm() / expected.norm()).item()
        assert error <= 1e-5, (run["layout"], name, error)


@pytest.mark.parametrize("family", FAMILIES)
def test_sequence_mean_differs_from_token_mean_and_agrees_across_data_parallelism(trained, family):
    reference, alone, split = *trained(1)[family][:2], trained(2)[family][0]
    assert (alone["layout"], split["layout"]) == (ALONE, SPLIT)
    loss = next(metrics.get("policy/loss") for metrics in alone["metrics"])
    assert loss != pytest.approx(reference["metrics"][0]["policy/loss"], rel=1e-3)
    assert split["metrics"][0]["policy/loss"] == pytest.approx(loss, rel=1e-5)
    assert split["metrics"][4]["sft/loss"] == pytest.approx(alone["metrics"][4]["sft/loss"], rel=1e-5)


@pytest.mark.parametrize("world_size", RUNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_that_scores_the_batch_itself_is_the_same_to_the_bit(trained, family, world_size):
    for run in trained(world_size)[family]:
        check_same_update(run["alone"], exact=run["layout"].get("fused_head", True))
