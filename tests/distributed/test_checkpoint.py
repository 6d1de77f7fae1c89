"""Checkpoints resume exactly, reshard, and refuse damage; broken or refused updates leave the weights alone."""

from __future__ import annotations

import math
from datetime import date

import pytest
from transformers import AutoTokenizer

from megatron_reheat.model.checkpoint import latest_checkpoint, list_checkpoints, verify_checkpoint
from tests.distributed.launch import launch
from tests.e2e import runs
from tests.hostile_checkpoints import PAYLOADS, REASONS
from tests.tiny_models import save_tiny_model

INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}
LOADS = [{"data": 2}, {"tensor": 2}, {"pipeline": 2}, INTERLEAVED, {"context": 2}]
BF16 = {"dtype": "bfloat16"}
LAYOUTS = [
    {"tensor": 2},
    {"pipeline": 2},
    {"data": 2},
    {"data": 2, **BF16},
    {"data": 2, "distributed_optimizer": False, **BF16},
    {"pipeline": 2, **BF16},  # a tied embedding on both stages
    {"tensor": 2, **BF16},
    {**INTERLEAVED, **BF16},
    {**INTERLEAVED, "distributed_optimizer": False, **BF16},
    {"context": 2, **BF16},
]
BACKGROUND = [LAYOUTS[2], *LAYOUTS[3:]]
TRIP = [LAYOUTS[3], LAYOUTS[5], LAYOUTS[7], LAYOUTS[6], LAYOUTS[7]]
# on four ranks: the optimizer's parts of several chunks, each of which is split over replicas
WIDE = [{**INTERLEAVED, "data": 2, **BF16}, {"data": 4, **BF16}, {"tensor": 2, "data": 2, **BF16}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model("qwen3_tied", tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def round_trip(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoint")
    results = launch(
        "checkpoint_round_trip", 2, root, folder=folder, checkpoints=root / "c", save={"data": 2}, loads=LOADS,
        recipe=dated_recipe(root),
    )  # fmt: skip
    return root / "c", results


def dated_recipe(root):
    """A recipe whose chat template prints the date."""
    tree = runs.recipe(runs.make_model_folder(root / "model"), root)
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    tokenizer.chat_template = "{{ strftime_now('%d%m') }}|{{ messages[0].content }}="
    tokenizer.save_pretrained(root / "model")
    tree["data"] |= {"template": "chat", "prompt_key": "metadata.expression", "max_prompt_tokens": 20}
    return runs.write_recipe({**tree, "eval": {}}, root / "dated.yaml")


def test_resuming_the_same_layout_is_bit_exact(round_trip):
    _, (result, _) = round_trip
    layout, state, losses = result["resumed"][0]
    assert layout == LOADS[0]
    assert losses == result["expected"]
    assert state == {"note": "kept"}


def test_a_save_starts_no_process_that_could_be_killed_or_outlive_the_rank(round_trip):
    assert [result["forked"] for result in round_trip[1]] == [0, 0]


def test_resuming_another_layout_agrees_to_rounding(round_trip):
    _, (result, _) = round_trip
    assert len(result["resumed"]) == len(LOADS)
    for _, _, losses in result["resumed"][1:]:
        assert losses == pytest.approx(result["expected"], rel=1e-5)
        assert losses[1] < losses[0]


def test_ranks_that_start_around_midnight_agree_on_the_date(round_trip):
    (mine, agreed), (other, other_agreed) = (result["started"] for result in round_trip[1])
    assert mine[0] == date(2024, 12, 31) and mine[1].startswith("3112|")
    assert other[0] == date(2025, 1, 1) and other[1].startswith("0101|") and other[2] != mine[2]
    assert agreed == other_agreed == mine


def test_what_was_just_written_and_the_newest_are_kept_and_latest_points_at_it(round_trip):
    folder, _ = round_trip
    assert [p.name for p in list_checkpoints(folder)] == ["step-2", "step-9"]
    assert latest_checkpoint(folder) == folder / "step-2"


def test_a_save_replaces_nothing_and_clears_what_a_killed_one_left(round_trip):
    folder, _ = round_trip
    assert (folder / "step-2.set-aside-1" / "somebody's").exists()
    assert not list(folder.glob(".step-[0-8].partial"))


def test_a_writer_that_cannot_write_is_one_sentence_and_leaves_the_old_checkpoint(round_trip):
    _, (result, _) = round_trip
    message, left = result["too_large"]
    assert left == ["latest", "step-1", "step-2", "step-9"]
    assert message.startswith("cannot write ") and "\n" not in message
    assert "File too large" in message or "a file could not be written in full" in message


def test_no_code_in_a_checkpoint_is_run(round_trip):
    """Resuming and forking load it whole, converting loads its weights."""
    folder, (result, _) = round_trip
    refused = result["refused"]
    assert {payload for payload, _ in refused} == set(PAYLOADS)
    assert {payload for payload, load in refused if load == "weights"} == {
        "instead of .metadata",
        "inside .metadata",
        "pointing outside",
    }
    for (payload, load), message in refused.items():
        reason = REASONS[payload] if load == "checkpoint" else REASONS[payload].removeprefix(".metadata is refused: ")
        assert reason in message and "; no earlier checkpoint in" in message and "\n" not in message, message
    assert not (folder.parent / "made").exists()


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
def rollbacks(folder, tmp_path_factory):
    """Per rank: what its updates did under each of LAYOUTS, and what came back from the trip."""
    root = tmp_path_factory.mktemp("rollbacks")
    return launch("rollbacks", 2, root, folder=folder, layouts=LAYOUTS, checkpoints=root / "c", trip=TRIP)


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=lambda index: str(LAYOUTS[index]))
def test_non_finite_and_refused_updates_change_nothing(rollbacks, index):
    for rank in rollbacks:
        result = rank["updates"][index]
        assert result["bad"] == (False, False)
        assert result["refused"] == (False, True)
        assert result["good"] == (True, True)
        assert result["unchanged"] and result["moved"]


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=lambda index: str(LAYOUTS[index]))
def test_a_rollback_restores_master_weights_and_weights_to_the_bit(rollbacks, index):
    for rank in rollbacks:
        result = rank["updates"][index]
        assert result["beyond_bfloat16"]  # else rounded weights would pass
        assert result["restored"] and result["repeats"] and result["reused"]
        assert len(set(result["losses"])) == 1


def test_checkpoints_of_every_layout_keep_the_bits_of_weights_moments_and_last_good_weights(rollbacks):
    for rank in rollbacks:
        trip = {name: kept for name, kept in rank["trip"].items() if name != "read"}
        assert trip == {"absent": True, "whole_state": True, "last_good": True, "teacher": True}


def test_a_rank_reads_the_moments_of_the_parameters_that_it_holds_a_part_of(rollbacks):
    """Megatron reads those of all of them on every rank, in host memory: 12 bytes a parameter of the model."""
    read = [asked for rank in rollbacks for asked in rank["trip"]["read"]]
    assert all(asked == needed <= everything for asked, needed, everything in read)
    assert any(asked < everything for asked, _, everything in read)


def test_model_chunks_that_are_split_over_replicas_roll_back_and_come_back_to_the_bit(folder, tmp_path):
    ranks = launch("rollbacks", 4, tmp_path, folder=folder, layouts=WIDE[:1], checkpoints=tmp_path / "c", trip=WIDE)
    for rank in ranks:
        (update,) = rank["updates"]
        assert update["unchanged"] and update["restored"] and update["repeats"] and update["beyond_bfloat16"]
        assert all(kept for name, kept in rank["trip"].items() if name != "read")


@pytest.fixture(scope="module")
def in_background(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("background")
    return launch("saves_in_background", 2, root, folder=folder, layouts=BACKGROUND, checkpoints=root / "c")


@pytest.mark.parametrize("index", range(len(BACKGROUND)), ids=lambda index: str(BACKGROUND[index]))
def test_a_save_in_the_background_holds_the_step_at_which_it_began(in_background, index):
    for rank in in_background:
        result = rank[index]
        assert result["restored"] == [(True, True, True)] * 2  # moved on meanwhile; and the state then, to the bit
        assert result["meanwhile"] == (None, [".step-2.partial", "latest", "step-1"], 2)
        assert result["complete"] == ["latest", "step-2"]
    assert any(rank[index]["reused"] for rank in in_background)


@pytest.mark.parametrize("index", range(len(BACKGROUND)), ids=lambda index: str(BACKGROUND[index]))
def test_a_save_in_the_background_that_cannot_be_written_is_the_same_sentence_everywhere(in_background, index):
    refusals = {rank[index]["refusal"] for rank in in_background}
    ((message, on_every_rank),) = refusals
    assert on_every_rank and message.startswith("cannot write ") and "\n" not in message
    assert "File too large" in message or "a file could not be written in full" in message
    for rank in in_background:
        assert rank[index]["left"] == ["latest", "step-2"] and rank[index]["at_last"] == ["latest", "step-4"]


@pytest.fixture(scope="module")
def minibatches(folder, tmp_path_factory):
    layouts = [{"data": 2}, {"pipeline": 2}]
    return launch("steps_with_a_bad_minibatch", 2, tmp_path_factory.mktemp("steps"), folder=folder, layouts=layouts)


@pytest.mark.parametrize("index", range(2), ids=["data", "pipeline"])
def test_a_minibatch_without_a_finite_gradient_is_skipped_and_counted(minibatches, index):
    for rank in minibatches:
        metrics, applied, finite, published = rank[index]["good"]
        assert (applied, finite, published) == (True, True, 1)
        assert metrics["optimizer/skipped_updates"] == 0 and metrics["optimizer/grad_norm"] > 0

        bad, applied, finite, published = rank[index]["bad"]
        assert (applied, finite, published) == (True, False, 1)
        assert bad["optimizer/skipped_updates"] == 1
        assert set(bad) == set(metrics) and all(math.isfinite(value) for value in bad.values())
        # the first minibatch is the same in both, so the ratios of the third show that the second did not move the weights
        assert bad["policy/ratio"] != metrics["policy/ratio"]

        worst, applied, finite, published = rank[index]["worst"]
        assert (applied, finite, published) == (False, False, 0)
        assert worst["optimizer/skipped_updates"] == 3 and worst["entropy/mean"] == metrics["entropy/mean"]
        assert not any(name.startswith("policy/") for name in worst)
