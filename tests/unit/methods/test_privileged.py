"""What the teacher of RLRT, RLSD and SDPG is shown."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_reheat.config import Config
from megatron_reheat.data.prompts import make_prompts
from megatron_reheat.errors import ConfigError
from megatron_reheat.methods.grpo import Tools
from megatron_reheat.methods.privileged import Privileged, teacher_view
from megatron_reheat.recipe import parse_config
from megatron_reheat.types import At, Completion, Group, Prompt, Reward, TrainBatch
from tests.character_tokenizer import character_tokenizer

TOKENIZER = character_tokenizer()
AT = At(step=1, rl_step=1, stage_step=0, temperature=1.0, seed=0)
RECORDS = [{"question": "q", "answer": "a", "solution": "s"}, {"question": "Q", "answer": "A", "solution": "S"}]


def recipe(**sections: Any) -> Config:
    data = {"path": "p", "hint_template": "{prompt}={solution};{prompt}", "max_hinted_prompt_tokens": 8}
    tree = {"model": {"hf_path": "m"}, "data": data, "rollout": {"max_tokens": 4}}
    return parse_config({**tree, **{name: {**tree.get(name, {}), **keys} for name, keys in sections.items()}})


def method(config: Config, hint: Any = "sibling", context: int = 64) -> Privileged:
    prompts = make_prompts(config.data, TOKENIZER, RECORDS, hint=hint)

    def hinted_prompt(prompt: Prompt, solution: str | None) -> Any:
        ids = prompts.hinted(prompt.index, solution)
        return None if ids is None else np.asarray(ids, np.int32)

    tools = Tools(SimpleNamespace(max_position_embeddings=context), TOKENIZER.decode, hinted_prompt)
    return Privileged(config, Privileged.Options(hint=hint), tools)


def group(*responses: tuple[str, bool], index: int = 0) -> Group:
    question = RECORDS[index]["question"]
    prompt = Prompt(index, question, tuple(TOKENIZER(question)["input_ids"]), {})
    ids = [np.asarray(TOKENIZER(text)["input_ids"], np.int32) for text, _ in responses]
    completions = tuple(Completion(i, np.zeros(len(i), np.float32), 1.0, 0, "stop") for i in ids)
    return Group(prompt, completions, tuple(Reward(float(right), right) for _, right in responses))


def shown(made: Privileged, group: Group) -> list[str | None]:
    ids = [s.privileged_token_ids for s in made.sequences(group, AT)]
    return [None if i is None else TOKENIZER.decode(i) for i in ids]


def test_a_sibling_is_the_first_success_that_is_not_the_sample_itself():
    made = method(recipe())
    assert shown(made, group(("w", False), ("x", True), ("y", True), ("z", True))) == [
        "q=x;q",
        "q=y;q",
        "q=x;q",
        "q=x;q",
    ]
    assert shown(made, group(("w", False), ("x", True), ("v", False))) == ["q=x;q", None, "q=x;q"]
    assert shown(made, group(("w", False), ("v", False))) == [None, None]
    assert shown(made, group(("x", True), ("w", False), index=1)) == [None, "Q=x;Q"]


def test_a_sibling_that_is_too_long_is_passed_over():
    made = method(recipe())  # 8 tokens hold a solution of 4
    assert shown(made, group(("12345", True), ("1234", True), ("w", False))) == ["q=1234;q", None, "q=1234;q"]


def test_the_records_own_solution_is_for_all():
    made = method(recipe(), "record")
    assert shown(made, group(("x", True), ("w", False), index=1)) == ["Q=S;Q", "Q=S;Q"]


def test_the_view_has_the_same_responses_behind_other_prompts():
    made = method(recipe())
    batch = TrainBatch(tuple(made.sequences(group(("w", False), ("xy", True)), AT)))
    first, second = teacher_view(batch).sequences
    assert TOKENIZER.decode(first.token_ids) == "q=xy;qw" and first.num_prompt_tokens == 6
    assert second == batch.sequences[1] and second.privileged_token_ids is None
    assert [s.num_response_tokens for s in (first, second)] == [s.num_response_tokens for s in batch.sequences]


@pytest.mark.parametrize(
    ("sections", "hint", "message"),
    [
        ({"data": {"hint_template": None}}, "sibling", "give data.hint_template (e.g. '{prompt} "),
        ({"data": {"hint_template": "{prompt}{{solution}}"}}, "sibling", "set rl.options.hint=record"),
        ({"parallel": {"microbatch_tokens": 11}, "data": {"max_prompt_tokens": 7}}, "record", "microbatch_tokens to 12"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(sections: dict[str, Any], hint: Any, message: str):
    (problem,) = Privileged.problems(recipe(**sections), Privileged.Options(hint=hint))
    assert message in problem


def test_what_makes_sense_is_not_refused():
    assert not list(Privileged.problems(recipe(), Privileged.Options()))
    named = recipe(data={"hint_template": "{prompt} {answer}"})
    assert not list(Privileged.problems(named, Privileged.Options(hint="record")))
    tight = recipe(data={"max_prompt_tokens": 8}, parallel={"microbatch_tokens": 12})
    assert not list(Privileged.problems(tight, Privileged.Options()))


def test_the_teachers_sequence_has_to_fit_the_models_context():
    method(recipe(), context=12)
    with pytest.raises(
        ConfigError, match=r"data\.max_hinted_prompt_tokens \+ rollout\.max_tokens = 12 tokens exceeds .* 11;"
    ):
        method(recipe(), context=11)
