from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_reheat.analysis.passk import avg_at_k, bootstrap_interval, pass_at_k, pass_at_k_by_prompt


@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_equals_enumeration_of_every_subset(k: int) -> None:
    correct = np.array([[False] * (6 - c) + [True] * c for c in range(7)])
    expected = [np.mean([any(subset) for subset in itertools.combinations(row, k)]) for row in correct]
    np.testing.assert_allclose(pass_at_k_by_prompt(correct, k), expected, rtol=1e-12, atol=1e-15)
    assert pass_at_k(correct, k) == pytest.approx(np.mean(expected), rel=1e-12)


def test_pass_at_1_is_avg_at_k_and_pass_at_n_is_any() -> None:
    correct = np.random.default_rng(0).random((50, 8)) < 0.2
    assert pass_at_k(correct, 1) == pytest.approx(avg_at_k(correct))
    assert avg_at_k(correct) == correct.mean()
    assert pass_at_k(correct, 8) == pytest.approx(correct.any(axis=1).mean())


def test_many_samples_do_not_overflow() -> None:
    correct = np.zeros((1, 4096), dtype=bool)
    correct[0, 0] = True
    assert pass_at_k(correct, 1024) == pytest.approx(1024 / 4096)  # one lucky sample is drawn with chance k/n


@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match="n = 4 samples"):
        pass_at_k(np.ones((2, 4), dtype=bool), k)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (4, 0)])
def test_empty_or_flat_grades_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[P, n\]"):
        avg_at_k(np.ones(shape, dtype=bool))


def test_bootstrap_matches_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(0.4, 0.1, size=400)
    low, high = bootstrap_interval(values, seed=7)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert bootstrap_interval(values, seed=7) == (low, high)
    narrow = bootstrap_interval(values, seed=7, level=0.5)
    assert low < narrow[0] < values.mean() < narrow[1] < high


def test_bootstrap_of_equal_values_has_no_width() -> None:
    assert bootstrap_interval(np.array([0.5, 0.5]), seed=0) == (0.5, 0.5)
    with pytest.raises(ValueError, match="one value per prompt"):
        bootstrap_interval(np.array([]), seed=0)
