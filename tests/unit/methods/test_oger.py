"""OGER: what joins teachers to prompts, which rollout gives way, and what the rest is worth."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_reheat.clock import Clock
from megatron_reheat.data import encoders
from megatron_reheat.data.prompts import make_prompts
from megatron_reheat.errors import ConfigError
from megatron_reheat.methods import choose_method
from megatron_reheat.methods.grpo import Tools
from megatron_reheat.methods.oger import OGER
from megatron_reheat.recipe import parse_config
from megatron_reheat.types import At, Collected, Completion, Group, Reward, Scores, TrainBatch
from tests.character_tokenizer import character_tokenizer

TOKENIZER = character_tokenizer()
END = 1
AT = At(step=1, rl_step=1, stage_step=0, temperature=1.0, seed=3)
RECORDS = [{"question": "p", "answer": "a", "id": 7}, {"question": "q", "answer": "b", "id": 8}]


class Letters:
    """Texts by how often they have each letter."""

    def encode(self, texts: Any) -> Any:
        rows = np.array([[t.count(chr(c)) for c in range(32, 127)] for t in texts], float)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def ids(text: str) -> np.ndarray:
    return np.asarray([*TOKENIZER(text)["input_ids"], END], np.int32)


def text_of(token_ids: Any) -> str:
    return TOKENIZER.decode([t for t in token_ids if t != END])


class Sampling:
    """`rollouts` of each prompt; a text is right that begins with r. Notes what was graded."""

    def __init__(self, prompts: Any, rollouts: list[list[str]]) -> None:
        self.prompts, self.rollouts = list(prompts), rollouts
        self.graded: list[str] = []

    def collect(self, at: At, clock: Clock, *, group_size: int, complete: Any) -> Collected:
        rows = [
            [Completion(ids(t), np.zeros(len(t) + 1, np.float32), 1.0, 0, "stop") for t in ts] for ts in self.rollouts
        ]
        first = self._groups(self.prompts, rows)
        return Collected(complete(first), first, [], {})

    def grade(self, prompts: Any, completions: Any, clock: Clock) -> list[Group]:
        self.graded += [text_of(c.token_ids) for cs in completions for c in cs]
        return self._groups(prompts, completions)

    def divide(self, items: Any, work: Any) -> Any:
        return list(work(items))

    def _groups(self, prompts: Any, completions: Any) -> list[Group]:
        def grade(completion: Completion) -> Reward:
            right = text_of(completion.token_ids).startswith("r")
            return Reward(float(right), right)

        return [Group(p, tuple(cs), tuple(map(grade, cs))) for p, cs in zip(prompts, completions, strict=True)]


def build(tmp_path: Path, trajectories: list[dict[str, Any]], **options: Any) -> tuple[OGER, Any]:
    path = tmp_path / "teachers.jsonl"
    path.write_text("".join(json.dumps(t) + "\n" for t in trajectories))
    teachers = {"path": str(path), **options.pop("teachers", {})}
    config = parse_config(
        {
            "model": {"hf_path": "m"},
            "data": {"path": "p", "raw_template": "{question}"},
            "rollout": {"max_tokens": 6},
            "rl": {"method": "oger", "group_size": 4, "options": {"teachers": teachers, **options}},
        }
    )
    prompts = make_prompts(config.data, TOKENIZER, RECORDS)
    tools = Tools(None, text_of, lambda *_: None, lambda text: ids(text).tolist(), prompts)
    made = choose_method(config).make(config, tools)
    assert isinstance(made, OGER)
    return made, prompts


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders.NGramEncoder, "check", lambda place: None)
    monkeypatch.setattr(OGER, "_encoder", Letters())


ROLLOUTS = [["rab", "wab", "rcd", "wcd"], ["rx", "ry", "rz", "rr"]]


def weighed(made: OGER, prompts: Any, rollouts: list[list[str]]) -> tuple[Sampling, Collected, TrainBatch, list]:
    sampling = Sampling(prompts, rollouts)
    collected = made.collect(sampling, AT, Clock())  # type: ignore[arg-type]
    batch = made.batch(collected, AT)
    rng = np.random.default_rng(0)
    entropies = [rng.uniform(0, 2, s.num_response_tokens).astype(np.float32) for s in batch.sequences]
    logprobs = [-e for e in entropies]
    return sampling, collected, made.weigh(batch, Scores(logprobs, entropies), None), entropies  # type: ignore[arg-type]


@pytest.mark.usefixtures("letters")
def test_rewards_and_advantages_are_the_formulas(tmp_path: Path) -> None:
    teachers = ["rabe", "wabf"]
    made, prompts = build(tmp_path, [{"question": "p", "trajectories": teachers}])
    _, collected, batch, entropies = weighed(made, prompts, ROLLOUTS)
    covered, plain = collected.groups
    vectors = {t: Letters().encode([t])[0] for t in [*teachers, *ROLLOUTS[0]]}
    distances = [1 - np.mean([vectors[t] @ vectors[o] for o in teachers]) for t in ROLLOUTS[0]]
    nearest = int(np.argmin(distances))
    assert [c.sampler for c in covered.completions] == ["teacher" if i == nearest else "policy" for i in range(4)]
    assert text_of(covered.completions[nearest].token_ids) in teachers
    assert plain == collected.first[1] and [len(g.completions) for g in collected.first] == [4, 4]

    rewards = np.array([r.value for r in covered.rewards])
    for i in range(4):
        if i != nearest:
            rewards[i] += distances[i] * math.exp(-entropies[i][-1]) * rewards[i]
    expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
    assert [s.advantage for s in batch.sequences[:4]] == pytest.approx(expected, rel=1e-6)
    assert [s.advantage for s in batch.sequences[4:]] == [0.0] * 4  # nothing to be far from
    teacher = batch.sequences[nearest]
    assert not teacher.on_policy and np.array_equal(teacher.rollout_logprobs, teacher.old_logprobs)  # type: ignore[arg-type]
    assert collected.metrics["oger/covered_fraction"] == 0.5
    assert collected.metrics["oger/distance"] == pytest.approx(np.mean(distances))
    assert made.metrics()["oger/teacher_accuracy"] == covered.rewards[nearest].value


@pytest.mark.usefixtures("letters")
@pytest.mark.parametrize("scaled", [False, True])
def test_a_group_that_is_all_right_is_not_blown_up_unless_it_is_asked_for(tmp_path: Path, scaled: bool) -> None:
    records = [{"question": "q", "trajectories": "rxy"}]
    made, prompts = build(tmp_path, records, scale_uniform_groups=scaled)
    _, collected, batch, entropies = weighed(made, prompts, ROLLOUTS)
    group = collected.groups[1]
    assert group.accuracy == 1
    bonuses = [
        made._distances.get(id(c), 0) * math.exp(-e[-1]) for c, e in zip(group.completions, entropies[4:], strict=True)
    ]
    centred = np.array(bonuses) - np.mean(bonuses)
    expected = centred / (np.std(bonuses, ddof=1) + 1e-6) if scaled else centred
    advantages = [s.advantage for s in batch.sequences[4:]]
    assert advantages == pytest.approx(expected, rel=1e-5)
    assert (max(map(abs, advantages)) > 1) == scaled


@pytest.mark.usefixtures("letters")
def test_a_group_that_is_all_wrong_teaches_nothing(tmp_path: Path) -> None:
    made, prompts = build(tmp_path, [{"question": "p", "trajectories": "wab"}])
    _, _, batch, _ = weighed(made, prompts, [["wab", "wx", "wy", "wz"], ROLLOUTS[1]])
    assert [s.advantage for s in batch.sequences[:4]] == [0.0] * 4


@pytest.mark.usefixtures("letters")
def test_trajectories_are_joined_by_any_field_left_out_if_long_and_graded_once(tmp_path: Path) -> None:
    records = [
        {"n": "7", "texts": ["rab", "r-too-long"]},  # the data's are numbers
        {"n": "7", "texts": ["rcd"]},
        {"n": "9", "texts": ["rx", "ry"]},
    ]
    teachers = {"key": "n", "prompt_key": "id", "texts_key": "texts"}
    made, prompts = build(tmp_path, records, teachers=teachers)
    (line,) = made.describe()
    assert "3 trajectories for 1 of 2 prompts; 2 for no prompt of the run left out" in line
    assert "1 of 3 are longer than rollout.max_tokens" in line
    drawn = set()
    sampling = Sampling(prompts, ROLLOUTS)
    for seed in range(20):
        at = At(step=1, rl_step=1, stage_step=0, temperature=1.0, seed=seed)
        collected = made.collect(sampling, at, Clock())  # type: ignore[arg-type]
        (teacher,) = [c for g in collected.groups for c in g.completions if c.sampler == "teacher"]
        assert teacher.token_ids[-1] == END
        drawn.add(text_of(teacher.token_ids))
        assert collected.metrics["oger/too_long_fraction"] == pytest.approx(1 / 3)
    assert drawn == {"rab", "rcd"} and sorted(sampling.graded) == ["rab", "rcd"]


@pytest.mark.usefixtures("letters")
@pytest.mark.parametrize(
    ("records", "options", "expected"),
    [
        ([{"question": "nowhere", "trajectories": "r"}], {}, r"rl\.options\.teachers: no 'question' in .* equals"),
        ([{"prompt": "p", "trajectories": "r"}], {}, r"rl\.options\.teachers\.key 'question' is missing in record 0"),
        ([{"question": "p", "text": "r"}], {}, r"rl\.options\.teachers\.texts_key 'trajectories' is missing"),
        ([{"question": "p", "trajectories": [3]}], {}, r"must hold a text or a list of texts"),
        (
            [{"question": "p", "trajectories": ["r"]}],
            {"encoder": "nowhere"},
            r"rl\.options\.encoder: nowhere is no folder",
        ),
        ([{"question": "p", "trajectories": ["r"]}], {"teachers": {"pat": "x"}}, r"teachers\.pat: unknown key"),
    ],
)
def test_what_cannot_be_joined_is_refused(tmp_path: Path, records: Any, options: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        build(tmp_path, records, **options)


def test_wrong_answers_must_not_be_worth_less_than_nothing() -> None:
    rl = {"method": "oger", "options": {"teachers": {"path": "t"}}}
    tree = {"model": {"hf_path": "m"}, "data": {"path": "p"}, "rl": rl}
    choose_method(parse_config(tree))
    with pytest.raises(ConfigError, match=r"reward\.incorrect=0"):
        choose_method(parse_config({**tree, "reward": {"incorrect": -1.0}}))


# -- encoders ----------------------------------------------------------------------------------------------------------


def test_n_grams_see_wording() -> None:
    pytest.importorskip("sklearn", reason="TF-IDF needs scikit-learn")
    corpus = ["so 3 + 4 = 7", "first 4 + 3, which is 7", "the answer is 7"]
    encoder = encoders.NGramEncoder(corpus)
    same, near, far, nothing = encoders.mean_similarity(encoder, [corpus[0], "so 3 + 4 is 7", "&&&&", ""], corpus[:1])
    assert same == pytest.approx(1, abs=1e-6) and 0.5 < near < 1 and far == nothing == 0


def test_a_model_encodes_by_the_mean_of_its_last_states(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModel

    from tests.e2e.runs import make_model_folder

    folder = make_model_folder(tmp_path / "model")
    encoder = encoders.ModelEncoder(str(folder))
    rows = encoder.encode(["1+2", "", "3*4"])
    states = AutoModel.from_pretrained(folder)(torch.tensor([[3, 12, 4]])).last_hidden_state[0].mean(0)
    assert rows[0] == pytest.approx((states / states.norm()).detach().numpy(), abs=1e-5)
    assert not rows[1].any() and np.linalg.norm(rows[2]) == pytest.approx(1, abs=1e-5)
    assert encoders.mean_similarity(encoder, ["1+2"], ["1+2", "3*4"])[0] == pytest.approx(
        (1 + rows[0] @ rows[2]) / 2, abs=1e-5
    )
