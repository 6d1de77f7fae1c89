"""Exact flattening: the policy becomes its own distribution at a higher temperature, without a step of training.

Dividing the weight of the norm before the head by T divides every logit by T: what reheating trains towards (arXiv 2606.00755,
section 3), reached in closed form, and the control that tells what the training adds.

Sampling the old policy at T (`controller.action=rollout_temperature`) gives the same responses for the same seeds, and RL that
takes its log-probabilities at T, as ours does, the same gradient of every parameter but that norm's weight, whose gradient is T
times as large here. The two ways part with the optimizer, which steps the smaller weight as far, and with whoever samples the
policy at temperature 1 afterwards: an evaluation, a user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq

from megatron_reheat.stages.policy import Policy
from megatron_reheat.types import Group, TrainBatch, TrainSequence

MAX_TEMPERATURE = 4.0
TOLERANCE = 0.005  # of the entropy that is aimed at
RESPONSES = 512  # that the entropy is measured on


class Flattened(NamedTuple):
    """`temperature` divides the logits from now on. `before` and `after` are the entropies on the same responses, in nats."""

    temperature: float
    before: float
    after: float


def flatten(policy: Policy, sampled: Sequence[Group], target: float, judged_tokens: int) -> Flattened:
    """Flattens the policy so that its entropy on the responses `sampled` becomes `target` nats, and publishes it.

    Responses of the flattened policy itself will be a little less certain than these. The temperature stays within 1 and
    MAX_TEMPERATURE. A collective over all ranks.
    """
    engine = policy.engine
    responses = [(g.prompt, c) for g in sampled for c in g.completions]
    chosen = np.linspace(0, len(responses) - 1, min(RESPONSES, len(responses))).round().astype(int)
    batch = TrainBatch(tuple(TrainSequence.of(*responses[i]) for i in chosen))
    norm = engine.final_norm()
    policy.rest()

    def entropy(temperature: float) -> float:
        engine.set_final_norm(norm, 1.0 / temperature)
        rows = [row[:judged_tokens] for row in engine.score(batch, temperature=1.0).entropies]
        return float(sum(row.sum(dtype="float64") for row in rows) / max(sum(map(len, rows)), 1))

    before = entropy(1.0)
    temperature, after = _solve(entropy, before, target)
    engine.set_final_norm(norm, 1.0 / temperature)
    policy.publish(policy.version + 1)
    return Flattened(temperature, before, after)


def _solve(entropy: Callable[[float], float], at_one: float, target: float) -> tuple[float, float]:
    """The temperature from 1 to MAX_TEMPERATURE at which `entropy`, which rises with it, is `target`; and what it is there."""
    if at_one >= target:
        return 1.0, at_one
    if (at_most := entropy(MAX_TEMPERATURE)) <= target:
        return MAX_TEMPERATURE, at_most
    known = {1.0: at_one, MAX_TEMPERATURE: at_most}

    def gap(temperature: float) -> float:
        if temperature not in known:
            known[temperature] = entropy(temperature)
        found = known[temperature] - target
        return 0.0 if abs(found) <= TOLERANCE * target else found

    temperature = brentq(gap, 1.0, MAX_TEMPERATURE, xtol=1e-6)
    return temperature, known[temperature]
