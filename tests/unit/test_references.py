"""From a record's answer to the grader's reference, and from sampled tokens to the text that the grader sees."""

from __future__ import annotations

import json
from collections import deque
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS
from reasoning_gym.games.rush_hour import Board
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_reheat.config import RewardConfig
from megatron_reheat.config_data import DataConfig
from megatron_reheat.data.prompts import PromptDataset, RewardKind, load_prompts
from megatron_reheat.data.references import gym_entry, reference_text
from megatron_reheat.data.responses import response_text
from megatron_reheat.errors import ConfigError
from megatron_reheat.evaluation.evaluate import _decode, _Model
from megatron_reheat.rewards.graders import grader_of
from megatron_reheat.rewards.pool import VerifierPool
from megatron_reheat.rewards.self_check import check_references
from megatron_reheat.types import Completion


def characters(*special: str) -> PreTrainedTokenizerFast:
    """One token a character, and `special` as special tokens."""
    tokens = ["<pad>", "<eos>", *special, *map(chr, range(32, 127)), "\n"]
    by_character = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    by_character.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    by_character.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=by_character, pad_token="<pad>", eos_token="<eos>", extra_special_tokens=list(special)
    )


def prompts_of(
    tmp_path: Path, records: list[dict[str, Any]], reward_kind: RewardKind = "math", **settings: Any
) -> PromptDataset:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_prompts(DataConfig(path=str(path), **settings), characters(), reward_kind=reward_kind)


# -- reference answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("\\frac12", "\\frac12"),
        (5, "5"),
        (-7, "-7"),
        (10**30, "1" + "0" * 30),
        (27.0, "27.0"),
        (0.5, "0.5"),
        (1e-05, "0.00001"),
        (1.5e-7, "0.00000015"),
        (1e22, "1" + "0" * 22),
        (6.02e23, "602" + "0" * 21),
        (Decimal("1.10"), "1.10"),
        (["42"], "42"),
        ([42], "42"),
    ],
)
def test_references_keep_their_exact_form(value: Any, text: str) -> None:
    assert reference_text(value, "it") == text
    assert grader_of("math")(f"\\boxed{{{text}}}", {"answer": text}) == 1.0


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (None, "is null"),
        ("", "holds ''"),
        (" \n", r"holds ' \\n'"),
        ("NaN", "holds 'NaN'"),
        (float("nan"), "is nan"),
        (float("inf"), "is inf"),
        (Decimal("NaN"), "is NaN"),
        (True, r"holds a truth value \(true\)"),
        (["1", "2"], "holds a list of 2"),
        ([], "holds an empty list"),
        ([None], "is null"),
        ({"value": "1"}, "holds a dict"),
        (b"1", "holds a bytes"),
    ],
)
def test_what_is_no_reference_is_refused_by_name(value: Any, what: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^column 'answer' in record 3 {what}; a reference answer is a text or a finite"
    ):
        reference_text(value, "column 'answer' in record 3")


def test_records_with_numbers_and_with_no_reference(tmp_path: Path) -> None:
    records = [{"question": "q", "answer": answer} for answer in (1e-05, 27.0, ["3"], "4")]
    assert [p.verifier["answer"] for p in prompts_of(tmp_path, records)] == ["0.00001", "27.0", "3", "4"]
    for answer in (float("nan"), {"a": 1}, [1, 2], True):
        with pytest.raises(ConfigError, match=r"data\.answer_key 'answer' in record 1.* (holds|is) "):
            prompts_of(tmp_path, [records[0], {"question": "q", "answer": answer}])


# -- sampled tokens as text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [(), ("<answer>", "</answer>", "<think>", "</think>", "\\boxed", "<|im_end|>")])
def test_only_what_ends_a_response_is_left_out_of_its_text(special: tuple[str, ...]) -> None:
    """Where answer tags are special tokens, both commands decode them as they decode plain text."""
    tokenizer = characters(*special)
    written = "<think>4</think> so \\boxed{42} <answer>7+4</answer>"
    end = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<eos>", "<pad>")]
    stops = tuple(end[: 2 if special else 0]) or (tokenizer.eos_token_id,)
    ids = [*tokenizer(written, add_special_tokens=False)["input_ids"], stops[0], tokenizer.pad_token_id]
    assert len(ids) < len(written) or not special
    assert response_text(tokenizer, ids, stops) == written

    completion = Completion(np.array(ids, np.int32), np.zeros(len(ids), np.float32), 1.0, 0, "stop")
    assert _decode(_Model(Path(), None, tokenizer, stops), completion) == written
    entry = {"question": "", "answer": None, "metadata": {"numbers": [7, 4], "target": 11}}
    assert grader_of("reasoning_gym")(written, {"task": "countdown", "entry": entry}) == 1.0
    assert grader_of("math")(written, {"answer": "42"}) == 1.0


# -- copies of reasoning-gym's tasks -----------------------------------------------------------------------------------

TASKS = sorted(DATASETS.keys() - {"composite"})  # composite mixes others
OPTIONS: dict[str, dict[str, Any]] = {"rush_hour": {"max_moves": 3}}
NOT_FOR_ARROW = ("codeio", "futoshiki", "graph_color", "knights_knaves")  # values of several types in one field


@pytest.mark.parametrize("task", TASKS)
def test_copies_of_every_task_score_their_own_answers(task: str, tmp_path: Path) -> None:
    made = list(reasoning_gym.create_dataset(task, seed=3, size=2, **OPTIONS.get(task, {})))
    rows = [e | {"metadata": json.dumps(e["metadata"])} for e in made] if task in NOT_FOR_ARROW else made
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    arrow = DataConfig(source="datasets", path=str(tmp_path / "saved"), max_prompt_tokens=10**6)
    copies = {
        "jsonl": prompts_of(tmp_path, made, reward_kind="reasoning_gym", max_prompt_tokens=10**6),
        "datasets": load_prompts(arrow, characters(), reward_kind="reasoning_gym"),
    }
    for name, prompts in copies.items():
        assert [p.verifier["task"] for p in prompts] == [task] * 2
        for prompt, entry in zip(prompts, made, strict=True):
            response = f"<answer>{oracle(task, entry)}</answer>"
            assert grader_of("reasoning_gym")(response, prompt.verifier) == 1.0, name


def test_a_composite_is_scored_by_the_task_of_each_entry() -> None:
    parts = [{"name": name, "weight": 1.0, "config": {}} for name in ("basic_arithmetic", "arc_agi")]
    mixed = {"datasets": [reasoning_gym.composite.DatasetSpec(**part) for part in parts]}
    config = DataConfig(source="reasoning_gym", name="composite", options=mixed, size=6, max_prompt_tokens=10**6)
    prompts = load_prompts(config, characters(), reward_kind="reasoning_gym")
    assert {p.verifier["task"] for p in prompts} == {"basic_arithmetic", "arc_agi"}
    for prompt in prompts:
        response = f"<answer>{prompt.verifier['entry']['answer']}</answer>"
        assert grader_of("reasoning_gym")(response, prompt.verifier) == 1.0


def test_metadata_that_is_text_must_be_a_json_object() -> None:
    assert gym_entry({"metadata": '{"source_dataset": "countdown"}'}, "record 0")[0] == "countdown"
    for text in ("{", "[1]"):
        with pytest.raises(ConfigError, match="metadata of record 0 is text but no JSON object"):
            gym_entry({"metadata": text}, "record 0")


def oracle(task: str, entry: dict[str, Any]) -> str:
    """An answer that the task itself gives, or one found here for the tasks that give none."""
    metadata = entry["metadata"]
    if entry["answer"] is not None:
        return str(entry["answer"])
    if task == "graph_color":
        return json.dumps(metadata["possible_answer"])
    if task == "boxnet":
        return json.dumps(boxes_brought_home(metadata["initial_state"]))
    if task == "rush_hour":
        return way_out(metadata["board_config"])
    return str(metadata.get("example_answer") or metadata["example_correct_answer"])


def boxes_brought_home(state: dict[str, list[str]]) -> list[dict[str, str]]:
    """Moves that bring each box, one after another, to a target of its colour."""
    targets = [(square, item) for square, items in state.items() for item in items if item.startswith("target_")]
    moves = []
    for start, items in state.items():
        for box in (item for item in items if item.startswith("box_")):
            home = next(target for target in targets if target[1] == box.replace("box_", "target_"))
            targets.remove(home)
            (x, y), (to_x, to_y) = (tuple(map(float, square.split("_"))) for square in (start, home[0]))
            while (x, y) != (to_x, to_y):
                here = f"Agent[{x}, {y}]"
                x, y = (x + (1 if to_x > x else -1), y) if x != to_x else (x, y + (1 if to_y > y else -1))
                moves.append({here: f"move({box}, square[{x}, {y}])"})
            moves.append({f"Agent[{x}, {y}]": f"move({box}, {home[1]})"})
    return moves


def way_out(board: str) -> str:
    """The shortest moves that free the primary piece, found breadth first."""
    paths, seen = deque([""]), set()
    while True:
        path = paths.popleft()
        reached = Board(board)
        reached.perform_moves(path)
        if reached.solved:
            return path
        if (state := str(reached)) not in seen:
            seen.add(state)
            pieces = [chr(ord("A") + i) for i, piece in enumerate(reached._pieces) if not piece.fixed]
            paths += [f"{path} {piece}{step}" for piece in pieces for step in ("+1", "-1")]


# -- references that cannot be earned ----------------------------------------------------------------------------------


def test_references_are_graded_against_themselves() -> None:
    good = ["42", "\\frac12", "x^2", "#### 7", "so \\boxed{7}", "\\text{Monday}", "42"]
    bad = ["\\frac{1}{2", "\\boxed{}", ";", "42)}{" + "x" * 100]
    with VerifierPool(RewardConfig(kind="math", workers=1)) as pool:
        check = check_references(pool, [{"answer": answer} for answer in [*good, *bad]])
        assert (check.count, check.failed, check.cut_short) == (len(good) - 1 + len(bad), tuple(bad), False)
        assert str(check) == (
            "references: 4 of 10 are not right when graded against themselves, so that no response can earn them: "
            r"'\\frac{1}{2'; '\\boxed{}'; ';'"
        )
        assert str(check_references(pool, [{"answer": "1"}])) == (
            "references: 0 of 1 are not right when graded against themselves"
        )


def test_entries_are_graded_against_their_own_answers() -> None:
    entries = [dict(entry) for entry in reasoning_gym.create_dataset("countdown", seed=1, size=3)]
    entries[1]["answer"] = "none of these"
    entries[2]["answer"] = None
    with VerifierPool(RewardConfig(kind="reasoning_gym", workers=1)) as pool:
        check = check_references(pool, [{"task": "countdown", "entry": entry} for entry in entries])
    assert (check.count, check.failed) == (2, ("none of these",))


def test_an_entry_that_comes_again_is_graded_once() -> None:
    (made,) = reasoning_gym.create_dataset("countdown", seed=1, size=1)

    def entry(place: int, **changes: Any) -> dict[str, Any]:
        return {**made, "metadata": {**made["metadata"], "source_index": place, **changes}}

    wrong = entry(2, target=made["metadata"]["target"] + 1)  # the same question and answer, and another verdict
    entries = [entry(0), entry(1), wrong, entry(3), {**entry(4), "question": "another text"}]
    with VerifierPool(RewardConfig(kind="reasoning_gym", workers=1)) as pool:
        check = check_references(pool, [{"task": "countdown", "entry": each} for each in entries])
    assert (check.count, check.failed) == (3, (made["answer"],))
