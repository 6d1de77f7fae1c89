"""SCOPE-RL: what is sampled again, at which temperature, and what it weighs in the loss."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_reheat.clock import Clock
from megatron_reheat.errors import ConfigError
from megatron_reheat.methods import choose_method
from megatron_reheat.parallel.packing import make_microbatches
from megatron_reheat.parallel.vocab import VocabLogits
from tests.unit.methods.builders import at, collected, group, make, recipe


class Sampling:
    """Gives `own`, and of the prompts that are sampled again every second response right."""

    def __init__(self, own) -> None:
        self.own, self.again_asked = own, []

    def collect(self, at, clock, *, group_size, complete=None):
        return self.own

    def again(self, prompts, n, temperature, clock, *, sampler="policy"):
        self.again_asked.append(([p.index for p in prompts], n, temperature))
        return [group(p.index, [2] * n, [i % 2 for i in range(n)], temperature) for p in prompts]


def own_groups(count: int, size: int = 4):
    return collected(*(group(i, [2] * size, [1.0, *[0.0] * (size - 1)]) for i in range(count)))


def run_collect(method, sampling, entropy):
    return method.collect(sampling, at(entropy), Clock())


@pytest.mark.parametrize(
    ("entropy", "temperature"), [(0.5, 1.0), (0.42, 1.08), (0.55, 0.95), (0.1, 1.2), (0.9, 0.8), (0.3, 1.2)]
)
def test_the_temperature_follows_the_error_within_bounds(entropy, temperature):
    assert make(recipe("scope")).temperature(entropy) == pytest.approx(temperature)


@pytest.mark.parametrize(("entropy", "temperature"), [(0.5, 1.2), (0.1, 1.2), (0.51, 0.8)])
def test_the_early_form_knows_two_temperatures(entropy, temperature):
    assert make(recipe("scope", {"variant": "aepo", "replaced_rows": 1})).temperature(entropy) == temperature


def test_a_share_of_the_prompts_is_sampled_again_and_at_least_one():
    method = make(recipe("scope", {"alpha": 0.5}, rl={"group_size": 6}))
    sampling = Sampling(own_groups(4))
    made = run_collect(method, sampling, 0.4)
    assert sampling.again_asked == [([0, 1], 6, pytest.approx(1.1))]
    assert made.groups == sampling.own.groups and len(made.extra) == 2
    assert made.metrics["scope/temperature"] == pytest.approx(1.1)
    assert made.metrics["scope/positive_fraction"] == 0.5 and made.metrics["scope/sampled_ratio"] == 0.5
    sampling = Sampling(own_groups(4))
    run_collect(make(recipe("scope")), sampling, 0.4)  # a 64th of four prompts
    assert sampling.again_asked == [([0], 8, pytest.approx(1.1))]
    sampling = Sampling(own_groups(8))
    run_collect(make(recipe("scope", {"variant": "aepo", "replaced_rows": 2})), sampling, 0.4)
    assert sampling.again_asked == [([0, 1], 8, 1.2)]


def test_it_multiplies_the_steps_temperature():
    method = make(recipe("scope", rollout={"temperature": 0.9}))
    sampling = Sampling(own_groups(4))
    method.collect(sampling, at(0.4, temperature=0.9), Clock())
    assert sampling.again_asked[0][2] == pytest.approx(0.99)


@pytest.mark.parametrize("variant", ["scope", "aepo"])
def test_without_an_entropy_or_a_batch_nothing_is_sampled_again(variant):
    method = make(recipe("scope", {"variant": variant, "replaced_rows": 3}))
    for own, entropy in ((own_groups(4), None), (collected(), 0.4)):
        sampling = Sampling(own)
        assert run_collect(method, sampling, entropy) is own and not sampling.again_asked
    assert len(method.batch(own_groups(4), at())) == 16


def test_correct_samples_weigh_alpha_over_all_samples_and_their_length():
    method = make(recipe("scope", {"alpha": 0.25}))
    extra = [group(0, [2, 4, 3], [1.0, 0.0, 1.0], 1.1), group(1, [5, 1, 1], [0.0, 0.0, 0.0], 1.1)]
    batch = method.batch(collected(group(0, [2, 2], [1.0, 0.0]), extra=extra), at())
    assert len(batch) == 4
    own, steering = batch.sequences[:2], batch.sequences[2:]
    assert [s.share for s in own] == [None, None] and all(s.on_policy for s in own)
    assert [s.advantage for s in own] == pytest.approx([0.5**0.5, -(0.5**0.5)], rel=1e-5)
    assert [s.share for s in steering] == pytest.approx([0.25 / (6 * 2), 0.25 / (6 * 3)])
    assert [s.advantage for s in steering] == [1.0, 1.0] and not any(s.on_policy for s in steering)
    assert batch.num_valid_tokens == 4


def test_no_correct_sample_leaves_the_batch_as_it_is():
    method = make(recipe("scope"))
    own = collected(group(0, [2, 2], [1.0, 0.0]), extra=[group(0, [2, 4], [0.0, 0.0], 1.1)])
    assert len(method.batch(own, at())) == 2


def test_the_whole_loss_is_grpos_plus_alpha_times_the_clipped_ratio_of_the_correct():
    """Value and gradient against the formula, written out over dense float64 logits."""
    alpha, vocabulary = 0.25, 9
    config = recipe("scope", {"alpha": alpha}, rl={"tis_cap": 1.01})
    method = make(config)
    extra = [group(0, [2, 4, 3], [1.0, 0.0, 1.0], 1.1)]
    batch = method.batch(collected(group(1, [3, 2], [1.0, 0.0]), extra=extra), at())
    generator = np.random.default_rng(0)
    old = [np.log(generator.uniform(0.05, 0.4, s.num_response_tokens)).astype(np.float32) for s in batch.sequences]
    batch = method.weigh(batch, SimpleNamespace(logprobs=old), SimpleNamespace())
    (micro,) = make_microbatches(batch, data_rank=0, data_size=1, microbatch_tokens=100, alignment=1)
    logits = torch.randn(len(micro.tokens), vocabulary, generator=torch.Generator().manual_seed(1), requires_grad=True)
    loss, _ = method.loss(at())(VocabLogits(logits, vocabulary), micro)
    loss.backward()

    dense = logits.detach().double().requires_grad_()
    logprobs = dense.log_softmax(-1)
    borders = micro.cu_seqlens.tolist()
    expected = torch.zeros((), dtype=torch.float64)
    for index, start in zip(micro.sequence_indices, borders, strict=False):
        sequence = batch.sequences[index]
        response = torch.tensor(sequence.token_ids[2:]).long()
        rows = range(start + 1, start + 1 + len(response))
        new = torch.stack([logprobs[row, token] for row, token in zip(rows, response, strict=True)])
        ratio = (new - torch.tensor(old[index]).double()).exp()
        if index < 2:
            advantage = (0.5 if index == 0 else -0.5) / (0.5**0.5 + 1e-6)
            tis = (torch.tensor(old[index]).double() + 1.0).exp().clamp_max(1.01)  # sampled at log-probability -1
            term = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
            term = term.clamp_min(10 * advantage) if advantage < 0 else term
            expected = expected - (term * tis).sum() / 5
        else:  # no importance correction of the temperature
            expected = expected - alpha / 3 * torch.minimum(ratio, ratio.clamp(0.8, 1.28)).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(logits.grad.double(), dense.grad, rtol=1e-4, atol=1e-7)


def test_the_early_form_puts_better_samples_in_the_place_of_the_first_rows():
    method = make(recipe("scope", {"variant": "aepo", "replaced_rows": 3}, rl={"prompts_per_step": 2, "group_size": 3}))
    extra = [
        group(0, [1, 2, 3], [1.0, 0.0, 1.0], 1.2),
        group(1, [4, 4, 4], [1.0, 1.0, 1.0], 1.2),  # no better than the others of their group
        group(2, [5, 6, 7], [1.0, 0.0, 1.0], 1.2),
    ]
    own = collected(group(0, [8, 8, 8], [1.0, 0.0, 0.0]), group(1, [9, 9, 9], [0.0, 1.0, 1.0]), extra=extra)
    below = method.batch(own, at(0.4)).sequences
    assert [s.num_response_tokens for s in below] == [1, 3, 5, 9, 9, 9]
    assert [s.advantage for s in below[:3]] == [1.0] * 3 and not any(s.on_policy for s in below[:3])
    assert all(s.share is None for s in below) and all(s.on_policy for s in below[3:])
    above = method.batch(own, at(0.6)).sequences
    assert [s.num_response_tokens for s in above] == [1, 8, 8, 9, 9, 9]


@pytest.mark.parametrize(
    ("options", "sections", "message"),
    [
        ({}, {"rl": {"entropy_coef": 0.1}}, "set rl.entropy_coef=0"),
        ({"variant": "aepo", "replaced_rows": 32}, {}, "leaves nothing of the batch of 32 rows"),
        ({"max_temperature": 1.5}, {"rollout": {"temperature": 1.4}}, "is 2.1, above 2"),
        ({"max_temperature": 1.9}, {"controller": {"action": "rollout_temperature"}}, "is 2.28, above 2"),
        ({"min_temperature": 0.1}, {"rollout": {"temperature": 0.05}}, "is 0.005, below 0.01"),
        ({"max_temperature": 1.0}, {}, "rl.options.max_temperature"),
        ({"targt_entropy": 1.0}, {}, "did you mean 'target_entropy'"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(options, sections, message):
    with pytest.raises(ConfigError) as caught:
        choose_method(recipe("scope", options, **sections))
    assert message in str(caught.value)
