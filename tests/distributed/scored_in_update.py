"""What an update that scores its batch itself must share with one of a batch that was scored before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def check_same_update(pair: Sequence[Any], *, exact: bool = True) -> None:
    """Scores, metrics and weights of both (`cases._scored_in_update`): to the bit, or to rounding."""
    (scores, metrics, weights), (own_scores, own_metrics, own_weights) = pair
    assert len(own_scores.logprobs) == len(scores.logprobs) > 0 and metrics["policy/ratio"] == 1.0
    for name in ("logprobs", "entropies"):
        for own, expected in zip(getattr(own_scores, name), getattr(scores, name), strict=True):
            assert (own == expected).all() if exact else own == pytest.approx(expected, abs=1e-6)
    assert own_metrics == (metrics if exact else pytest.approx(metrics, rel=1e-6, abs=1e-9))
    assert all((own_weights[name] == weights[name]).all() for name in weights) or not exact
