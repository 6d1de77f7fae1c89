"""The adaptive entropy coefficient: its walk, its gate, the bonus that it makes, and what survives a restart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_reheat.errors import ConfigError
from megatron_reheat.types import Scores
from tests.unit.methods.batches import make_case, make_method, run


def scores_of(case, entropy: float) -> Scores:
    return Scores(case.scores.logprobs, [np.full(len(row), entropy, np.float32) for row in case.scores.logprobs])


def test_the_coefficient_rises_below_the_target_and_falls_above_it_within_its_bounds():
    case = make_case()
    method = make_method("adaptive_entropy", {"target": 0.2, "delta": 0.01, "coef_max": 0.025}, entropy_coef=0.01)
    seen = []
    for entropy in (0.3, 0.1, 0.1, 0.1, 0.1, 0.3, 0.1):
        method.weigh(case.batch, scores_of(case, entropy), None)
        seen.append((method.entropy_coef, method.metrics()["adaptive_entropy/next_coef"]))
    expected = [(0, 0), (0, 0.01), (0.01, 0.02), (0.02, 0.025), (0.025, 0.025), (0, 0.015), (0.015, 0.025)]
    np.testing.assert_allclose(seen, expected, atol=1e-12)


def test_the_bonus_in_the_loss_is_the_applied_one():
    case = make_case()
    low, high = (replace(case, scores=scores_of(case, entropy)) for entropy in (0.1, 0.3))
    adaptive = [run(make_method("adaptive_entropy", entropy_coef=0.05), c) for c in (low, high)]
    fixed = [run(make_method("grpo", entropy_coef=coef), case) for coef in (0.05, 0.0)]
    for ours, theirs in zip(adaptive, fixed, strict=True):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1]) and ours[2] == theirs[2]
    assert not torch.equal(adaptive[0][1], adaptive[1][1])


def test_it_goes_on_after_a_restart_where_it_was():
    case = make_case()
    whole, before, after = (make_method("adaptive_entropy") for _ in range(3))
    for method in (whole, before):
        for _ in range(3):
            method.weigh(case.batch, scores_of(case, 0.1), None)
    after.load_state(before.state())
    for method in (whole, after):
        method.weigh(case.batch, scores_of(case, 0.1), None)
    assert after.entropy_coef == whole.entropy_coef == pytest.approx(0.015) and after.state() == whole.state()


def test_a_start_beyond_its_bounds_is_refused():
    with pytest.raises(ConfigError, match=r"rl\.entropy_coef 0\.5.*is not between rl\.options\.coef_min 0 and"):
        make_method("adaptive_entropy", {"coef_max": 0.1}, entropy_coef=0.5)
