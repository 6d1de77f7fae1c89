"""S2L-PO: how many of a group the explorer writes, what is trained on, and what is left out."""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
import pytest

from megatron_reheat.clock import Clock
from megatron_reheat.errors import ConfigError
from megatron_reheat.methods import choose_method
from megatron_reheat.methods.grpo import Tools
from megatron_reheat.methods.s2l_po import S2LPO, explorer_share
from megatron_reheat.recipe import parse_config
from megatron_reheat.types import At, Collected, Completion, Group, Prompt, Reward, Scores, TrainBatch

PROMPTS = [Prompt(i, "", (1, 2), {}) for i in range(2)]


def recipe(**rl: Any) -> Any:
    rl = {"method": "s2l_po", "samplers": {"explorer": "m"}, "group_size": 4, **rl}
    return parse_config({"model": {"hf_path": "m"}, "data": {"path": "p"}, "rl": rl, "run": {"steps": 12}})


def method(**rl: Any) -> S2LPO:
    config = recipe(**rl)
    made = choose_method(config).make(config, Tools(None, str, lambda *_: None))
    assert isinstance(made, S2LPO)
    return made


def at(rl_step: int, step: int = 100) -> At:
    return At(step=step, rl_step=rl_step, stage_step=0, temperature=1.0, seed=0)


def completions(sampler: str, n: int, logprob: float) -> tuple[Completion, ...]:
    one = [np.full(2, logprob, np.float32) for _ in range(n)]
    return tuple(Completion(np.array([3, 4], np.int32), lp, 1.0, 0, "stop", sampler) for lp in one)


class Sampling:
    """The policy is wrong and the explorer right; notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def collect(self, at: At, clock: Clock, *, group_size: int, complete: Any = None) -> Collected:
        self.asked.append(("policy", group_size))
        rewards = (Reward(0.0, False),) * group_size
        first = [Group(p, completions("policy", group_size, -1.0), rewards) for p in PROMPTS]
        return Collected(complete(first) if complete else first, first, [], {"x": 1.0})

    def again(self, prompts: Any, n: int, temperature: float, clock: Clock, *, sampler: str, top_p: float) -> Any:
        self.asked.append((sampler, n, temperature, top_p))
        return [Group(p, completions("explorer", n, -0.25), (Reward(1.0, True),) * n) for p in prompts]


@pytest.mark.parametrize("group_size", [2, 7, 8, 16])
@pytest.mark.parametrize("mix", [2, 4, 8, 50])
def test_the_share_is_the_papers_ceil_without_rounding_errors(group_size: int, mix: int) -> None:
    for i in range(1, mix + 3):
        a = 1 - Fraction(i - 1, mix - 1) if i <= mix else Fraction(0)
        assert explorer_share(i, mix, group_size) == ceil(a * group_size)


def test_half_of_the_run_is_mixed_and_steps_of_other_stages_do_not_count() -> None:
    made = method()
    assert [made.group_size(at(i)) for i in range(1, 8)] == [
        1,
        1,
        1,
        2,
        3,
        4,
        4,
    ]  # 4, 4, 3, 2, 1 and 0 are the explorer's
    assert made.group_size(at(6, step=1)) == made.group_size(at(6, step=900)) == 4


def test_where_the_group_is_the_explorers_the_policy_is_measured_and_not_trained_on() -> None:
    made, sampling = method(options={"mix_steps": 3, "temperature": 0.9}), Sampling()
    collected = made.collect(sampling, at(1), Clock())  # type: ignore[arg-type]
    assert sampling.asked == [("policy", 1), ("explorer", 4, 0.9, 0.95)]
    assert all({c.sampler for c in g.completions} == {"explorer"} for g in collected.groups)
    assert all([c.sampler for c in g.completions] == ["policy"] for g in collected.first)
    batch = made.batch(collected, at(1))
    assert len(batch) == 8 and not any(s.on_policy for s in batch.sequences)


def test_later_the_group_is_a_union_with_one_baseline() -> None:
    made, sampling = method(options={"mix_steps": 3}), Sampling()
    collected = made.collect(sampling, at(2), Clock())  # type: ignore[arg-type]
    assert sampling.asked == [("policy", 2), ("explorer", 2, 0.7, 0.95)]
    assert collected.metrics == {"x": 1.0, "s2l_po/policy_accuracy": 0.0, "s2l_po/explorer_accuracy": 1.0}
    batch = made.batch(collected, at(2))
    deviation = np.std([0, 0, 1, 1], ddof=1) + 1e-6
    assert [s.advantage for s in batch.sequences[:4]] == pytest.approx(np.array([-0.5, -0.5, 0.5, 0.5]) / deviation)
    assert [s.on_policy for s in batch.sequences[:4]] == [True, True, False, False]
    assert made.metrics() == {"s2l_po/explorer_share": 0.5}


def test_after_the_mixing_it_is_grpo() -> None:
    made, sampling = method(options={"mix_steps": 3}), Sampling()
    made.collect(sampling, at(3), Clock())  # type: ignore[arg-type]
    assert sampling.asked == [("policy", 4)] and made.metrics() == {"s2l_po/explorer_share": 0.0}


def weighed(max_gap: float | None, far: float) -> tuple[S2LPO, TrainBatch]:
    """The explorer is at -0.25 a token; the policy gives its last sequence `far`, and all else -1."""
    made, sampling = method(options={"mix_steps": 3, "max_gap": max_gap}), Sampling()
    batch = made.batch(made.collect(sampling, at(2), Clock()), at(2))  # type: ignore[arg-type]
    scores = [np.full(2, -1.0, np.float32)] * (len(batch) - 1) + [np.array([far, far - 2], np.float32)]
    return made, made.weigh(batch, Scores(scores, scores), None)  # type: ignore[arg-type]


def test_an_explorers_ratio_starts_at_one_outside_of_tis() -> None:
    made, batch = weighed(None, far=-5.0)
    assert len(batch) == 8
    for sequence in batch.sequences:
        assert sequence.old_logprobs is not None and sequence.rollout_logprobs is not None
        if not sequence.on_policy:
            assert np.array_equal(sequence.old_logprobs, sequence.rollout_logprobs)
    gaps = [0.75] * 6 + [4.75, 6.75]
    assert made.metrics()["s2l_po/logprob_gap"] == pytest.approx(np.mean(gaps))
    assert made.metrics()["s2l_po/logprob_gap_max"] == pytest.approx(6.75)
    assert made.metrics()["s2l_po/rejected_fraction"] == 0.0


def test_a_sequence_too_far_from_the_policy_is_left_out_of_the_loss_and_its_count() -> None:
    made, batch = weighed(2.0, far=-5.0)
    assert len(batch) == 7 and batch.num_valid_tokens == 14
    assert made.metrics()["s2l_po/rejected_fraction"] == 0.25
    _, all_kept = weighed(5.75, far=-5.0)  # its mean gap, exactly
    assert len(all_kept) == 8


def test_the_explorer_has_to_be_named() -> None:
    with pytest.raises(ConfigError, match=r"rl\.samplers\.explorer"):
        choose_method(recipe(samplers={}))
    with pytest.raises(ConfigError, match=r"rl\.options\.mix_stepz: unknown key; did you mean 'mix_steps'"):
        choose_method(recipe(options={"mix_stepz": 3}))


def test_what_check_counts_is_what_the_schedule_samples() -> None:
    config = recipe(options={"mix_steps": 3})  # of 12 steps: 4, 2 and 0 of the explorer, 1, 2, 4, 4, ... of the policy
    costs = choose_method(config).costs(config)
    assert costs.frozen == {"explorer": pytest.approx(6 / 48)}
    assert costs.sampled == pytest.approx((1 + 2 + 10 * 4) / 48 - 1)
