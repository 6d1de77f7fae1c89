"""The controller as a state machine: entropies in, verdicts out."""

from __future__ import annotations

import math

import pytest

from megatron_reheat.config import ControllerConfig
from megatron_reheat.stages.controller import Controller, ControllerState, Verdict

CONFIG = ControllerConfig(
    collapse_below=0.08,
    reheat_to=0.12,
    smoothing_steps=3,
    max_reheat_steps=4,
    max_rounds=2,
    cooldown_steps=5,
    runaway_entropy=0.5,
    runaway_jump=0.1,
)


def drive(controller: Controller, entropies: list[float]) -> list[Verdict]:
    """Feeds entropies to whichever stage is on and carries the verdicts out."""
    verdicts = []
    for entropy in entropies:
        in_rl = controller.state.stage == "rlvr"
        verdict = controller.observe_rl(entropy) if in_rl else controller.judge_reheat(entropy)
        controller.carry_out(verdict)
        verdicts.append(verdict)
    return verdicts


def collapsed(**changes) -> Controller:
    controller = Controller(CONFIG.model_copy(update=changes))
    assert drive(controller, [0.05] * 3)[-1] is Verdict.ENTER_REHEAT
    return controller


def test_collapse_is_judged_on_the_smoothed_entropy():
    controller = Controller(CONFIG)
    assert drive(controller, [0.01, 0.01]) == [Verdict.CONTINUE] * 2  # not enough steps yet
    assert drive(Controller(CONFIG), [0.01, 0.2, 0.05, 0.05]) == [Verdict.CONTINUE] * 4  # mean of the last three: 0.1
    assert drive(Controller(CONFIG), [0.2, 0.07, 0.07, 0.07])[-1] is Verdict.ENTER_REHEAT


def test_exactly_the_threshold_is_not_a_collapse():
    assert drive(Controller(CONFIG), [0.08] * 6) == [Verdict.CONTINUE] * 6


def test_reheating_ends_at_the_target():
    controller = collapsed()
    assert controller.state.stage == "reheat" and controller.state.round == 1
    assert drive(controller, [0.06, 0.09, 0.13]) == [Verdict.CONTINUE, Verdict.CONTINUE, Verdict.TARGET_REACHED]
    assert controller.state.stage == "rlvr" and controller.state.stage_steps == 0


def test_step_cap_allows_exactly_max_reheat_steps_updates():
    verdicts = drive(collapsed(), [0.06] * 5)
    assert verdicts == [Verdict.CONTINUE] * 4 + [Verdict.STEP_CAP]


def test_an_uncollapsed_policy_is_refused_and_spends_no_round():
    controller = collapsed()
    for _ in range(3):
        assert drive(controller, [0.3]) == [Verdict.NOT_COLLAPSED]
        assert (controller.state.stage, controller.state.round) == ("rlvr", 0)
        # the next try comes after the cooldown all the same
        assert drive(controller, [0.05] * 5) == [Verdict.CONTINUE] * 4 + [Verdict.ENTER_REHEAT]
    assert controller.state.round == 1


@pytest.mark.parametrize("entropy", [0.6, 0.25, math.nan, math.inf])
def test_runaway_by_level_jump_or_nan(entropy):
    controller = collapsed()
    assert drive(controller, [0.06, entropy]) == [Verdict.CONTINUE, Verdict.RUNAWAY]
    assert controller.state.stage == "rlvr"


def test_cooldown_and_rounds_limit_reheating():
    controller = collapsed()
    drive(controller, [0.06, 0.13])
    second = drive(controller, [0.05] * 5)
    assert second == [Verdict.CONTINUE] * 4 + [Verdict.ENTER_REHEAT]  # five RL steps of cooldown
    drive(controller, [0.06, 0.13])
    assert drive(controller, [0.05] * 20) == [Verdict.CONTINUE] * 20  # both rounds are used
    assert controller.state.round == 2


@pytest.mark.parametrize(
    ("action", "expected"),
    [("none", Verdict.CONTINUE), ("stop", Verdict.STOP), ("rollout_temperature", Verdict.RAISE_TEMPERATURE)],
)
def test_other_arms(action, expected):
    controller = Controller(CONFIG.model_copy(update={"action": action}))
    assert drive(controller, [0.05] * 3)[-1] is expected
    assert controller.state.stopped == (action == "stop")
    assert controller.state.temperature_raised == (action == "rollout_temperature")
    if action == "rollout_temperature":
        assert drive(controller, [0.05] * 3) == [Verdict.CONTINUE] * 3  # raised once


def test_state_survives_json_and_goes_on_in_the_middle_of_a_stage():
    controller = collapsed()
    drive(controller, [0.06, 0.07])
    copy = Controller(CONFIG, ControllerState(**controller.state.to_json()))
    rest = [0.08, 0.09, 0.09]
    assert drive(copy, rest) == drive(controller, rest)
    assert copy.state == controller.state


def test_a_fork_decides_from_the_entropies_it_inherits():
    stopped = Controller(CONFIG.model_copy(update={"action": "stop"}))
    drive(stopped, [0.05] * 3)
    state = ControllerState(**stopped.state.to_json())
    state.stopped = False
    assert Controller(CONFIG, state).judge_rl() is Verdict.ENTER_REHEAT


def test_every_verdict_explains_itself_with_numbers():
    controller = collapsed()
    for verdict in Verdict:
        text = controller.explain(verdict, 0.1234)
        assert any(character.isdigit() for character in text)


# --- cooling: the other way round

COOLING = CONFIG.model_copy(update={"action": "cool", "cool_above": 0.6, "cool_to": 0.4})


def cooling() -> Controller:
    controller = Controller(COOLING)
    assert drive(controller, [0.8] * 3)[-1] is Verdict.ENTER_REHEAT
    return controller


def test_cooling_begins_above_its_threshold_and_not_on_a_collapse():
    assert drive(Controller(COOLING), [0.6] * 6 + [0.01] * 6) == [Verdict.CONTINUE] * 12
    controller = cooling()
    assert (controller.state.stage, controller.state.round) == ("reheat", 1)


def test_cooling_ends_below_its_target_whatever_is_a_run_away_in_reheating():
    assert COOLING.runaway_entropy < 0.7
    assert drive(cooling(), [0.7, 0.5, 0.4, 0.39]) == [Verdict.CONTINUE] * 3 + [Verdict.TARGET_REACHED]
    assert drive(cooling(), [0.39]) == [Verdict.NOT_COLLAPSED]
    assert drive(cooling(), [0.7] * 5) == [Verdict.CONTINUE] * 4 + [Verdict.STEP_CAP]


@pytest.mark.parametrize("entropy", [0.81, math.nan, math.inf])
def test_cooling_that_heats_is_a_run_away(entropy):
    assert drive(cooling(), [0.7, entropy]) == [Verdict.CONTINUE, Verdict.RUNAWAY]


def test_cooling_explains_itself_by_its_own_thresholds():
    controller = Controller(COOLING)
    controller.observe_rl(0.8)
    texts = [
        controller.explain(v, 0.39)
        for v in (Verdict.ENTER_REHEAT, Verdict.TARGET_REACHED, Verdict.STEP_CAP, Verdict.NOT_COLLAPSED)
    ]
    assert [text for text in texts if "reheat" in text] == []
    assert "> 0.6 nats" in texts[0] and "< 0.4 nats" in texts[1] and "< 0.4 nats" in texts[3]
