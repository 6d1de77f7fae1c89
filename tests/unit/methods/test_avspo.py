"""AVSPO: when groups without an advantage are given one, which, and what of it survives a restart."""

from __future__ import annotations

import json

import pytest

from megatron_reheat.errors import ConfigError
from megatron_reheat.methods import choose_method
from megatron_reheat.methods.avspo import is_collapsed, virtual_rewards
from tests.unit.methods.builders import at, collected, group, make, recipe

RIGHT, WRONG, MIXED = [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0]


def step(method, *rewards):
    groups = [group(i, [2] * len(row), row) for i, row in enumerate(rewards)]
    return [s.advantage for s in method.batch(collected(*groups), at()).sequences]


@pytest.mark.parametrize(("rate", "size"), [(0.3, 0.68), (0.5, 0.73), (0.9, 0.81)])
def test_the_advantage_of_eight_equal_rewards(rate, size):
    """Figures from methods.md's numerical check of the formulas."""
    for reward, sign in ((1.0, 1), (0.0, -1)):
        rewards = [reward] * 8
        spread = rewards + virtual_rewards(rewards, rate)
        mean = sum(spread) / len(spread)
        deviation = (sum((r - mean) ** 2 for r in spread) / len(spread)) ** 0.5
        assert (reward - mean) / deviation == pytest.approx(sign * size, abs=0.005)


def test_virtual_rewards_are_spread_below_right_and_above_wrong_ones():
    assert virtual_rewards([1.0] * 4, 0.5) == pytest.approx([0.75, 0.5, 0.25])  # ceil(4 * 0.707) = 3
    assert virtual_rewards([2.0] * 4, 0.25) == pytest.approx([4 / 3, 2 / 3])
    assert virtual_rewards([0.0] * 4, 0.5) == pytest.approx([0.1, 0.2 / 3, 0.1 / 3])
    assert len(virtual_rewards([0.0] * 4, 1.0)) == 4 and len(virtual_rewards([1.0] * 4, 1e-9)) == 1


def test_collapsed_groups_get_an_advantage_and_others_keep_theirs():
    method = make(recipe("avspo", {"threshold": 0.5}))
    advantages = step(method, RIGHT, WRONG, MIXED)
    # ACR 2/3, K = ceil(4 * 0.8165) = 4; right ones 1 with 0.8, 0.6, 0.4, 0.2: mean 0.75, mean square 0.65
    assert advantages[:4] == pytest.approx([0.25 / 0.0875**0.5] * 4, rel=1e-4)
    # wrong ones 0 with 0.1, 0.075, 0.05, 0.025: mean 0.03125, mean square 0.00234375
    assert advantages[4:8] == pytest.approx([-0.03125 / (0.00234375 - 0.03125**2) ** 0.5] * 4, rel=1e-4)
    assert advantages[8:] == pytest.approx([0.866025, -0.866025, -0.866025, 0.866025], rel=1e-4)
    assert method.metrics() == {
        "avspo/collapse_rate": pytest.approx(2 / 3), "avspo/threshold": 0.5, "avspo/augmented_fraction": pytest.approx(2 / 3),
    }  # fmt: skip


def test_without_the_division_it_is_the_distance_from_the_mean():
    method = make(recipe("avspo", {"threshold": 0.4}, rl={"normalize_by_std": False}))
    advantages = step(method, RIGHT, MIXED)  # ACR 1/2: 1 with 0.75, 0.5, 0.25
    assert advantages[:4] == pytest.approx([1 - 5.5 / 7] * 4)


def test_the_rate_is_the_batchs_and_has_to_exceed_the_threshold():
    method = make(recipe("avspo", {"threshold": 0.5}))
    assert step(method, RIGHT, MIXED)[:4] == [0.0] * 4  # half of the batch is not more than a half
    assert method.metrics()["avspo/augmented_fraction"] == 0
    method = make(recipe("avspo", {"threshold": 0.49}))
    assert step(method, RIGHT, MIXED)[0] > 0


def test_the_threshold_follows_the_rate_while_the_reward_rises_and_leaves_it_while_it_falls():
    method = make(recipe("avspo", {"threshold": 0.5, "threshold_rate": 0.1}))

    def threshold(*rewards):
        step(method, *rewards)
        return method.metrics()["avspo/threshold"]

    assert threshold(MIXED, WRONG) == 0.5  # none before it; ACR 1/2, J 1/4
    assert threshold(MIXED, RIGHT, MIXED, MIXED) == pytest.approx(0.5 + 0.1 * (0.25 - 0.5))  # J 5/8
    assert threshold(MIXED, RIGHT, MIXED, MIXED) == pytest.approx(0.475)  # equal rewards: as it was
    assert threshold(WRONG, WRONG, WRONG, MIXED) == pytest.approx(0.475 - 0.1 * (0.75 - 0.475))  # J 1/8


def test_the_threshold_survives_a_restart():
    first = make(recipe("avspo", {"threshold_rate": 0.1}))
    step(first, MIXED, WRONG)
    step(first, MIXED, RIGHT, MIXED, MIXED)
    second = make(recipe("avspo", {"threshold_rate": 0.1}))
    second.load_state(json.loads(json.dumps(first.state())))
    for method in (first, second):
        step(method, WRONG, WRONG, WRONG, MIXED)
    assert first.state() == second.state() and first.state()["threshold"] != 0.5


def test_a_step_without_a_group_changes_nothing():
    method = make(recipe("avspo"))
    before = method.state()
    assert step(method) == [] and method.state() == before


def test_collapsed_means_equal_to_rounding():
    assert is_collapsed([0.1 + 0.2, 0.3]) and not is_collapsed([0.3, 0.3001])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rl": {"dynamic_sampling": True}}, "set rl.dynamic_sampling=false"),
        ({"reward": {"incorrect": -1.0}}, "reward.incorrect is -1; set it to 0"),
        ({"rl": {"overlong_buffer": 10}}, "set rl.overlong_buffer=0"),
    ],
)
def test_what_its_formulas_do_not_cover_is_refused(sections, message):
    with pytest.raises(ConfigError) as caught:
        choose_method(recipe("avspo", **sections))
    assert message in str(caught.value)


def test_a_buffer_without_a_penalty_is_none():
    choose_method(recipe("avspo", rl={"overlong_buffer": 10, "overlong_penalty": 0.0}))
