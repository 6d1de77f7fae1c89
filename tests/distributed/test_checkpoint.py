"""Checkpoints resume exactly, reshard, and refuse damage; broken or refused updates leave the weights alone."""

from __future__ import annotations

import pytest

from megatron_reheat.model.checkpoint import latest_checkpoint, list_checkpoints, verify_checkpoint
from tests.distributed.launch import launch
from tests.tiny_models import save_tiny_model

LOADS = [{"data": 2}, {"tensor": 2}, {"pipeline": 2}]
LAYOUTS = [{"tensor": 2}, {"pipeline": 2}, {"data": 2}, {"data": 2, "dtype": "bfloat16"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model("qwen3_tied", tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def round_trip(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoint")
    result = launch(
        "checkpoint_round_trip", 2, root, folder=folder, checkpoints=root / "c", save={"data": 2}, loads=LOADS
    )[0]
    return root / "c", result


def test_resuming_the_same_layout_is_bit_exact(round_trip):
    _, result = round_trip
    layout, state, losses = result["resumed"][0]
    assert layout == LOADS[0]
    assert losses == result["expected"]
    assert state == {"note": "kept"}


def test_resuming_another_layout_agrees_to_rounding(round_trip):
    _, result = round_trip
    assert len(result["resumed"]) == len(LOADS)
    for _, _, losses in result["resumed"][1:]:
        assert losses == pytest.approx(result["expected"], rel=1e-5)
        assert losses[1] < losses[0]


def test_only_the_newest_is_kept_and_latest_points_at_it(round_trip):
    folder, _ = round_trip
    assert [p.name for p in list_checkpoints(folder)] == ["step-2"]
    assert latest_checkpoint(folder) == folder / "step-2"


def test_an_unfinished_checkpoint_is_ignored(round_trip):
    folder, _ = round_trip
    (folder / ".step-9.partial").mkdir()
    assert latest_checkpoint(folder) == folder / "step-2"


def test_damage_is_named(round_trip):
    folder, _ = round_trip
    checkpoint = folder / "step-2"
    assert verify_checkpoint(checkpoint) is None
    victim = max(checkpoint.glob("*.distcp"), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    problem = verify_checkpoint(checkpoint)
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert problem is not None and victim.name in problem and "earlier checkpoint" in problem
    assert verify_checkpoint(checkpoint) is None


@pytest.fixture(scope="module")
def updates(folder, tmp_path_factory):
    """One list a rank: what its updates did under each of LAYOUTS."""
    return launch("non_finite_updates", 2, tmp_path_factory.mktemp("updates"), folder=folder, layouts=LAYOUTS)


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=lambda index: str(LAYOUTS[index]))
def test_non_finite_and_refused_updates_leave_the_weights_alone(updates, index):
    for rank in updates:
        result = rank[index]
        assert result["bad"] == (False, False)
        assert result["refused"] == (False, True)
        assert result["good"] == (True, True)
        assert result["unchanged"] and result["moved"] and result["restored"]
        # the weights were restored and the moments forgotten, so the same step starts from the same loss
        assert result["losses"][0] == pytest.approx(result["losses"][1], rel=1e-6)
