"""Data mixes: shares are kept to within one prompt, a part comes round before it repeats, a resumed run goes on exactly."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_reheat.config import Config
from megatron_reheat.config_data import EvalConfig, TrainDataConfig
from megatron_reheat.data.mixture import MixedPrompts, mixed
from megatron_reheat.data.prompts import PromptCursor, PromptDataset, load_prompts
from megatron_reheat.errors import ConfigError
from megatron_reheat.recipe import dump_config, load_config, parse_config
from megatron_reheat.stages.collect import rollout_metrics
from megatron_reheat.types import Completion, Group, Prompt, Reward
from tests.character_tokenizer import character_tokenizer


def numbered(name: str, n: int) -> Any:
    return PromptDataset([Prompt(i, f"{name} {i}", (i,), {"answer": name}) for i in range(n)])


def of_sizes(sizes: dict[str, int], weights: dict[str, float] | None = None) -> MixedPrompts:
    return MixedPrompts({name: numbered(name, n) for name, n in sizes.items()}, weights)


def write(path: Path, *texts: str) -> str:
    path.write_text("".join(json.dumps({"question": text, "answer": "1"}) + "\n" for text in texts))
    return str(path)


def recipe(**sections: Any) -> Config:
    return parse_config({"model": {"hf_path": "m"}, **sections})


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.01, 50), min_size=4, max_size=4) | st.none(),
    shuffle=st.booleans(),
    drawn=st.integers(1, 300),
)
def test_shares_are_kept_and_a_part_comes_round_before_it_repeats(
    sizes: list[int], weights: list[float] | None, shuffle: bool, drawn: int
) -> None:
    names = [chr(ord("a") + i) for i in range(len(sizes))]
    of_names = None if weights is None else dict(zip(names, weights, strict=False))
    mix = of_sizes(dict(zip(names, sizes, strict=True)), of_names)
    cursor = PromptCursor(mix, seed=3, shuffle=shuffle)
    prompts = cursor.next(drawn)
    assert all(prompt.text.startswith(prompt.source) and mix[prompt.index] == prompt for prompt in prompts)
    while cursor.position != mix.epoch_length(cursor.epoch):  # to the end of an epoch
        prompts += cursor.next(1)
    counts = Counter(prompt.source for prompt in prompts)
    total = sum(of_names.values()) if of_names else sum(sizes)
    for name, size in zip(names, sizes, strict=True):
        share = (of_names[name] if of_names else size) / total * len(mix) * (cursor.epoch + 1)
        assert abs(counts[name] - share) < 1 + 1e-6
        of_part = Counter(prompt.text for prompt in prompts if prompt.source == name)
        assert max(of_part.values(), default=0) - min(of_part.values(), default=0) <= 1 or len(of_part) == size
        assert max(of_part.values(), default=0) <= -(-counts[name] // size)


def test_without_weights_an_epoch_is_every_prompt_once() -> None:
    mix = of_sizes({"a": 7, "b": 3})
    for epoch in range(3):
        assert sorted(mix.epoch_order("0", epoch, shuffle=True)) == list(range(10))
    assert mix.epoch_order("0", 0, shuffle=True) != mix.epoch_order("0", 1, shuffle=True)


def test_unshuffled_parts_are_interleaved() -> None:
    mix = of_sizes({"a": 6, "b": 2}, {"a": 3.0, "b": 1.0})
    texts = [prompt.text for prompt in PromptCursor(mix, seed=0, shuffle=False).next(8)]
    assert [text for text in texts if text[0] == "a"] == [f"a {i}" for i in range(6)]
    assert [i for i, text in enumerate(texts) if text[0] == "b"] == [2, 6]


def test_a_cursor_goes_on_exactly_and_refuses_another_mix() -> None:
    mix = of_sizes({"a": 5, "b": 9}, {"a": 2.0, "b": 1.0})
    whole = PromptCursor(mix, seed=1)
    first = whole.next(17)
    state = json.loads(json.dumps(whole.state()))
    rest = whole.next(30)
    again = PromptCursor(of_sizes({"a": 5, "b": 9}, {"a": 2.0, "b": 1.0}), seed=1)
    assert again.problem_of(state) is None
    again.load_state(state)
    assert again.next(30) == rest and first != rest[:17]
    for other in (of_sizes({"a": 5, "b": 9}, {"a": 3.0, "b": 1.0}), of_sizes({"b": 9, "a": 5}, {"a": 2.0, "b": 1.0})):
        with pytest.raises(
            ConfigError, match=r"the prompts themselves, their order or their weights \(data\.mix\) changed"
        ):
            PromptCursor(other, seed=1).load_state(state)


def test_parts_have_the_keys_of_data_that_they_do_not_give(tmp_path: Path) -> None:
    data = TrainDataConfig.model_validate(
        {
            "raw_template": "{question}=",
            "max_prompt_tokens": 9,
            "mix": {
                "sums": {"path": write(tmp_path / "sums.jsonl", "1+1", "2+2")},
                "products": {"path": write(tmp_path / "products.jsonl", "3*3"), "raw_template": "{question}:"},
            },
        }
    )
    mix = mixed(data, lambda part, section: load_prompts(part, character_tokenizer(), section=section))
    assert [(prompt.text, prompt.source) for prompt in mix] == [
        ("1+1=", "sums"),
        ("2+2=", "sums"),
        ("3*3:", "products"),
    ]
    assert [v["answer"] for v in mix.verifiers()] == ["1"] * 3 and mix.longest == 4 and len(mix.digests) == 3
    assert mix.describe()[1] == "data.mix.products: 1 prompts of 1 records; 33.3% of the mix, each 1.00 times an epoch"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"path": "x", "mix": {"a": {"path": "a"}}}, "data: `path` and `name` beside `mix` would not be read"),
        ({"mix": {"a": {}}}, "data.mix.a: source files needs `path`"),
        ({"mix": {"a": {"path": "a", "weight": 1}, "b": {"path": "b"}}}, "data: mix.b: has no weight, and others have"),
        ({"mix": {"a": {"path": "a", "weight": 0}}}, "data.mix.a.weight: Input should be greater than 0"),
        ({"mix": {"a": {"path": "a", "template": "chat"}}}, "data: mix.a.template: is the same for all parts"),
        ({"mix": {"a/b": {"path": "a"}}}, "a name is made of letters, digits, - and _"),
        ({"mix": {"a": {"path": "a", "wieght": 2}}}, "data.mix.a.wieght: unknown key; did you mean 'weight'?"),
        ({"mix": {"a": "a.jsonl"}}, "data.mix.a: must hold keys and values, not 'a.jsonl'"),
        ({"mix": {}}, "data: source files needs `path`"),
    ],
)
def test_a_mix_that_makes_no_sense_is_refused(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        recipe(data=data)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"eval": {"suites": {"a": {}}}}, "eval.suites.a: source files needs `path`"),
        (
            {"eval": {"data": {"path": "e"}, "suites": {"a": {"template": "raw"}}}},
            "eval.suites.a: source files needs `path`",
        ),
        ({"eval": {"suites": {"avg_at_k": {"path": "a"}}}}, "avg_at_k is what a metric is called"),
        (
            {"eval": {"suites": {"a": {"path": "a", "num_samples": 4}}, "temperature": 0, "num_samples": 1}},
            "eval.suites.a.num_samples 4 would be the same sample; set eval.suites.a.num_samples=1",
        ),
        (
            {"eval": {"suites": {"a": {"path": "a", "max_prompt_tokens": 99999}}}},
            "eval.suites.a.max_prompt_tokens + eval.max_tokens",
        ),
        (
            {"eval": {"suites": {"a": {"path": "a"}}}, "checkpoint": {"keep_best": "eval/avg_at_k"}},
            "needs eval.data, the held-out prompts to evaluate on, or name a suite (eval/a/avg_at_k)",
        ),
        (
            {"eval": {"suites": {"a": {"path": "a"}}}, "checkpoint": {"keep_best": "eval/b/avg_at_k"}},
            "there is no 'b' in eval.suites",
        ),
        ({"checkpoint": {"keep_best": "reward/mean"}}, "must be eval/avg_at_k, eval/pass_at_k, or the same of a suite"),
    ],
)
def test_suites_that_make_no_sense_are_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        recipe(data={"path": "d"}, **sections)
    assert said in str(error.value)


def test_suites_share_the_form_of_eval_data_and_not_its_place() -> None:
    held_out = EvalConfig.model_validate(
        {
            "data": {"path": "main.jsonl", "raw_template": "{q}", "size": 5, "seed": 7},
            "suites": {"hard": {"path": "hard.jsonl", "num_samples": 32}},
        }
    )
    assert list(held_out.sets) == ["", "hard"] and (held_out.samples_of(""), held_out.samples_of("hard")) == (8, 32)
    hard = held_out.suites["hard"]
    assert (hard.path, hard.raw_template, hard.size, hard.seed) == ("hard.jsonl", "{q}", None, 0)


def test_both_are_written_down_as_they_are_read_and_change_on_the_command_line(tmp_path: Path) -> None:
    config = load_config(
        "countdown_cpu_mix", ["data.mix.two_numbers.weight=7", "eval.suites.two_numbers.num_samples=2"]
    )
    assert config.data.mix["two_numbers"].weight == 7 and config.eval.samples_of("two_numbers") == 2
    assert config.data.mix["three_numbers"].raw_template == config.data.raw_template
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_each_part_is_on_record_under_its_name() -> None:
    def group(source: str, *correct: bool) -> Group:
        done = Completion(np.ones(2, np.int32), np.zeros(2, np.float32), 1.0, 0, "stop")
        rewards = tuple(Reward(float(c), c) for c in correct)
        return Group(Prompt(0, "p", (1,), {}, source=source), (done,) * len(correct), rewards)

    metrics = rollout_metrics([group("a", True, False), group("b", True, True), group("a", False, False)])
    assert {name: value for name, value in metrics.items() if name.startswith("data/")} == {
        "data/a/share": 2 / 3,
        "data/a/accuracy": 0.25,
        "data/a/uniform_group_fraction": 0.5,
        "data/b/share": 1 / 3,
        "data/b/accuracy": 1.0,
        "data/b/uniform_group_fraction": 1.0,
    }
    assert not any(name.startswith("data/") for name in rollout_metrics([group("", True, False)]))
