"""Intervals over seeds."""

from __future__ import annotations

import math

import pytest

from examples.over_seeds import Mean


def test_an_interval_is_students_over_seeds() -> None:
    # mean 0.52, standard deviation 0.02, t(2) = 4.303
    assert Mean.of([0.50, 0.52, 0.54]) == pytest.approx((0.52, 4.303 * 0.02 / math.sqrt(3)))
    assert Mean.of([0.5]) == (0.5, math.inf) and Mean.of([0.5]).show(2) == "0.50"
    assert Mean.of([0.5, 0.6]).show(2) == "0.55"  # of two, an interval says nothing
    assert Mean.of([1.0] * 12) == (1.0, 0.0)


def test_an_interval_has_ends() -> None:
    of_three = Mean.of([0.50, 0.52, 0.54])
    assert (of_three.low + of_three.high) / 2 == pytest.approx(0.52) and of_three.low < 0.5 < of_three.high
    assert Mean.of([0.5]).low == -math.inf
