"""Groups beyond those that a step trains on: which the next steps take up, which are dropped, and how they are saved."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_reheat.clock import Clock
from megatron_reheat.stages.collect import StepAbandoned
from megatron_reheat.stages.surplus import SampledAs, Surplus
from megatron_reheat.types import Completion, Group, Reward
from tests.unit.test_collect import AT, MIXED, PROMPTS, RIGHT, Sampler, make_collector

ALL = lambda n: [MIXED] * n  # noqa: E731


class Aging(Sampler):
    """Stamps what it samples with its `version`."""

    version = 1

    def sample(self, prompts, n, params, seed, clock):
        groups = super().sample(prompts, n, params, seed, clock)
        return [
            replace(g, completions=tuple(replace(c, policy_version=self.version) for c in g.completions))
            for g in groups
        ]


def make(*script, **rl):
    """Steps of three prompts of which `kept_fraction` says that a quarter is kept, so that twelve are sampled for three."""
    sampler = Aging(*script)
    collector = make_collector(sampler, **{"max_staleness": 1, "tis_cap": 2.0, **rl})
    collector.kept_fraction = 0.5
    return sampler, collector


def collect(collector, at=AT, group_size=2):
    collected = collector.collect(at, Clock(), group_size=group_size)
    counts = {name: collected.metrics.get(f"sampling/{name}_groups") for name in ("surplus", "reused", "expired")}
    return [g.prompt.index for g in collected.groups], list(counts.values()), collected


def test_what_is_left_over_comes_first_in_the_next_step_which_samples_for_the_rest_alone():
    sampler, collector = make((*[MIXED] * 5, *[RIGHT] * 4), ALL)
    assert collect(collector)[:2] == ([0, 1, 2], [2.0, 0.0, 0.0])
    assert len(sampler.asked[0]) == 9  # (3 + sqrt(3 x 0.5)) / 0.5
    sampler.version = 2
    places, counts, collected = collect(collector)
    assert places == [3, 4, 9] and counts[1:] == [2.0, 0.0]
    assert len(sampler.asked[1]) == 4  # for one: (1 + sqrt(1 x 0.44)) / 0.52, the running mean
    assert [g.completions[0].policy_version for g in collected.groups] == [1, 1, 2]
    assert [g.prompt.index for g in collected.first] == sampler.asked[1]  # the entropy is today's policy's
    assert collected.metrics["sampling/prompts"] == 4


def test_the_default_drops_them_and_says_no_more_than_before():
    _, collector = make(ALL, max_staleness=0)
    first = collect(collector)
    assert first[1] == [6.0, None, None] and len(collector.surplus) == 0
    assert collect(collector)[0] == [9, 10, 11]


@pytest.mark.parametrize(("limit", "age", "reused"), [(1, 1, 2), (1, 2, 0), (2, 2, 2), (2, 3, 0)])
def test_only_what_a_recent_enough_policy_sampled_is_taken_up(limit, age, reused):
    sampler, collector = make((*[MIXED] * 5, *[RIGHT] * 4), ALL, max_staleness=limit)
    collect(collector)
    sampler.version += age
    assert collect(collector)[1][1:] == [float(reused), 2.0 - reused]


@pytest.mark.parametrize("change", ["temperature", "group size"])
def test_what_was_sampled_otherwise_is_dropped(change):
    _, collector = make((*[MIXED] * 5, *[RIGHT] * 4), ALL)
    collect(collector)
    at = replace(AT, temperature=1.2) if change == "temperature" else AT
    _, counts, _ = collect(collector, at, 3 if change == "group size" else 2)
    assert counts[1:] == [0.0, 2.0]


def test_every_step_samples_something_and_what_is_not_needed_yet_stays():
    sampler, collector = make(ALL)
    collect(collector)  # of nine, six are left
    places, counts, _ = collect(collector)
    assert places[:2] == [3, 4] and len(sampler.asked) == 2 and counts[1] == 2.0
    assert collect(collector)[0][:2] == [5, 6]  # before what the second step had left over


def test_groups_that_a_method_completes_stay_in_their_step():
    _, collector = make(ALL)
    for places in ([0, 1, 2], [9, 10, 11]):
        collected = collector.collect(AT, Clock(), group_size=2, complete=list)
        assert [g.prompt.index for g in collected.groups] == places and len(collector.surplus) == 0


def test_a_step_that_is_abandoned_and_one_in_another_stage():
    _, collector = make((*[MIXED] * 5, *[RIGHT] * 4), lambda n: [RIGHT] * n)
    collect(collector)
    collector._should_stop = lambda: True
    with pytest.raises(StepAbandoned):
        collect(collector)
    assert len(collector.surplus) == 2
    collector.forget()
    assert len(collector.surplus) == 0


def test_what_is_kept_survives_as_json_to_the_bit():
    generator = np.random.default_rng(0)
    groups = []
    for prompt in (PROMPTS.take([5])[0], PROMPTS.take([2])[0]):
        completions = tuple(
            Completion(
                generator.integers(0, 2**31 - 1, 7).astype(np.int32),
                generator.normal(size=7).astype(np.float32),
                0.1 + 0.2,
                4,
                reason,
                sampler,
            )
            for reason, sampler in (("stop", "policy"), ("length", "teacher"))
        )
        groups.append(
            Group(prompt, completions, (Reward(1 / 3, True, parts={"length": 0.1}), Reward(-1.0, False, True)))
        )
    surplus, other = Surplus(1), Surplus(1)
    surplus.replace(SampledAs(2, 0.3), groups)
    other.load_state(json.loads(json.dumps(surplus.state())), PROMPTS.take)
    assert other.state() == surplus.state()
    for ours, theirs in zip(other.fresh(SampledAs(2, 0.3), 5), groups, strict=True):
        assert ours.prompt is theirs.prompt and ours.rewards == theirs.rewards
        for a, b in zip(ours.completions, theirs.completions, strict=True):
            assert a.token_ids.tobytes() == b.token_ids.tobytes() and a.token_ids.dtype == np.int32
            assert a.rollout_logprobs.tobytes() == b.rollout_logprobs.tobytes()
            assert replace(a, token_ids=b.token_ids, rollout_logprobs=b.rollout_logprobs) == b
    without = Surplus(0)
    without.load_state(surplus.state(), PROMPTS.take)
    assert len(without) == 0
