"""RLRT and RLSD: which samples the teacher reads, and what its log-probabilities make of the advantage."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_reheat.errors import ConfigError
from megatron_reheat.methods import choose_method
from megatron_reheat.methods.grpo import Tools
from tests.unit.methods.builders import Scorer, at, collected, group, make, random_scores, recipe

TEACHER_PROMPT = np.array([7, 7, 7], np.int32)
TOOLS = Tools(SimpleNamespace(max_position_embeddings=10_000), lambda ids: "solution", lambda *_: TEACHER_PROMPT)


def method_of(name, **options):
    sections = {"data": {"hint_template": "{prompt} {solution}", "max_hinted_prompt_tokens": 3000}}
    return make(recipe(name, options, **sections), TOOLS)


def dealt_by_hand(advantage, gaps, lam, clip):
    """A [(1 - lam) + lam clip(exp(sign(A) D), 1 - clip, 1 + clip)], token by token."""
    sign = (advantage > 0) - (advantage < 0)
    weights = [min(max(math.exp(sign * gap), 1 - clip), 1 + clip) for gap in gaps]
    return [advantage * ((1 - lam) + lam * weight) for weight in weights]


def weigh(method, *groups, gaps, step=1):
    """`gaps` are log p_teacher - log p_policy of the sequences that the teacher is to read, by index."""
    batch = method.batch(collected(*groups), at(step=step))
    scores = random_scores(batch)
    scorer = Scorer([scores.logprobs[i] + np.asarray(gap, np.float32) for i, gap in gaps.items()], at(step=step))
    return batch, scores, scorer, method.weigh(batch, scores, scorer)


def test_rlrt_weighs_tokens_of_correct_samples_that_the_teacher_finds_less_likely():
    method = method_of("rlrt", weight_clip=0.6)
    mixed = group(0, [3, 2, 4], [1.0, 0.0, 1.0])
    alone = group(1, [2, 3], [1.0, 0.0])  # without a sibling
    easy = group(2, [2, 2], [1.0, 1.0])  # without an advantage
    gaps = {0: [-0.3, 0.2, -3.0], 2: [0.0, 5.0, -0.1, 0.4]}
    batch, scores, scorer, weighed = weigh(method, mixed, alone, easy, gaps=gaps)
    (asked,) = scorer.asked
    assert [s.token_ids.tolist() for s in asked.sequences] == [[7, 7, 7, 3, 4, 5], [7, 7, 7, 3, 4, 5, 6]]
    assert [s.num_prompt_tokens for s in asked.sequences] == [3, 3]
    for i, sequence in enumerate(weighed.sequences):
        before = batch.sequences[i]
        np.testing.assert_array_equal(sequence.token_ids, before.token_ids)
        np.testing.assert_array_equal(sequence.old_logprobs, scores.logprobs[i])
        if i in gaps:
            expected = dealt_by_hand(before.advantage, [-gap for gap in gaps[i]], 0.5, 0.6)
            np.testing.assert_allclose(sequence.advantage, expected, rtol=1e-5)
        else:
            assert sequence.advantage == before.advantage
    # what the policy finds likelier by more than log 1.6 is at the bound
    assert weighed.sequences[0].advantage[2] == pytest.approx(batch.sequences[0].advantage * 1.3, rel=1e-5)
    seen = method.metrics()
    assert seen["rlrt/read_fraction"] == pytest.approx(2 / 7)
    assert seen["rlrt/log_ratio"] == pytest.approx(-np.mean([*gaps[0], *gaps[2]]), rel=1e-4)
    assert seen["rlrt/clipped_fraction"] == pytest.approx(2 / 7)  # of as many tokens: -3.0 and 5.0


def test_a_correct_sample_with_a_negative_advantage_turns_the_exponent_round():
    """As one that the overlong penalty puts below its group's mean."""
    method = method_of("rlrt")
    penalized = group(0, [2, 2, 2], [1.0, 1.0, 5.0])
    batch, _, _, weighed = weigh(method, penalized, gaps={0: [0.3, -0.3], 1: [0.1, 0.1], 2: [0.0, 0.0]})
    assert batch.sequences[0].advantage < 0
    expected = dealt_by_hand(batch.sequences[0].advantage, [-0.3, 0.3], 0.5, 1.0)
    np.testing.assert_allclose(weighed.sequences[0].advantage, expected, rtol=1e-5)
    assert abs(expected[0]) > abs(expected[1])


def test_rlsd_follows_the_teacher_on_wrong_samples_too():
    method = method_of("rlsd", decay_steps=None)
    gaps = {0: [0.1, -0.1], 1: [0.05, -3.0, 3.0]}
    batch, _, _, weighed = weigh(method, group(0, [2, 3], [1.0, 0.0]), gaps=gaps)
    for i, gap in gaps.items():
        expected = dealt_by_hand(batch.sequences[i].advantage, gap, 0.5, 0.2)
        np.testing.assert_allclose(weighed.sequences[i].advantage, expected, rtol=1e-5)
    # a wrong sample's token that the teacher finds unlikely is blamed the more, up to the bound
    assert weighed.sequences[1].advantage[1] == pytest.approx(batch.sequences[1].advantage * 1.1, rel=1e-5)


def test_the_teachers_part_falls_to_nothing_and_costs_nothing_then():
    for step, lam in ((1, 0.49), (25, 0.25)):
        method = method_of("rlsd")
        batch, _, _, weighed = weigh(method, group(0, [1, 1], [1.0, 0.0]), gaps={0: [0.1], 1: [0.1]}, step=step)
        expected = dealt_by_hand(batch.sequences[0].advantage, [0.1], lam, 0.2)
        np.testing.assert_allclose(weighed.sequences[0].advantage, expected, rtol=1e-5)
        assert method.metrics()["rlsd/lambda"] == pytest.approx(lam)
    method = method_of("rlsd")
    batch, _, scorer, weighed = weigh(method, group(0, [1, 1], [1.0, 0.0]), gaps={}, step=50)
    assert [s.advantage for s in weighed.sequences] == [s.advantage for s in batch.sequences]
    assert [len(asked) for asked in scorer.asked] == [0]
    assert method.metrics() == {"rlsd/lambda": 0.0, "rlsd/read_fraction": 0.0}


def test_an_extreme_gap_stays_finite():
    method = method_of("rlsd", weight_clip=1e9, decay_steps=None)
    batch, _, _, weighed = weigh(method, group(0, [2, 2], [1.0, 0.0]), gaps={0: [900.0, -900.0], 1: [0.0, 0.0]})
    expected = batch.sequences[0].advantage * np.array([0.5 + 0.5 * math.exp(20), 0.5 + 0.5 * math.exp(-20)])
    np.testing.assert_allclose(weighed.sequences[0].advantage, expected, rtol=1e-5)


def test_defaults_are_the_papers():
    rlrt, rlsd = (choose_method(method_of(name).config).options for name in ("rlrt", "rlsd"))
    assert (rlrt.hint, rlrt.lam, rlrt.decay_steps, rlrt.weight_clip) == ("sibling", 0.5, None, 1.0)
    assert (rlsd.hint, rlsd.lam, rlsd.decay_steps, rlsd.weight_clip) == ("record", 0.5, 50, 0.2)


@pytest.mark.parametrize("name", ["rlrt", "rlsd"])
def test_a_hint_template_is_needed(name):
    with pytest.raises(ConfigError, match=rf"rl\.method {name} shows its teacher more .* give data\.hint_template"):
        choose_method(recipe(name))
