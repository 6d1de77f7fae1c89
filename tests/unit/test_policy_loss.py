"""GRPO/DAPO: closed-form values and gradients, the clip in every region, advantages, overlong shaping, TIS."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_reheat.losses.advantage import group_advantages, overlong_penalty
from megatron_reheat.losses.policy import clipped_policy_loss, policy_loss, tis_weights
from megatron_reheat.parallel.packing import make_microbatches
from megatron_reheat.parallel.vocab import VocabLogits
from megatron_reheat.types import TrainBatch, TrainSequence

CLIP = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}


def test_on_policy_gradient_is_minus_the_advantage():
    logprobs = torch.tensor([-0.5, -2.0, -0.1], requires_grad=True)
    advantages = torch.tensor([1.5, -0.7, 0.0])
    clipped_policy_loss(logprobs, logprobs.detach(), advantages, **CLIP).loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside: -A rho, gradient -A rho
        (1.5, 2.0, -2.56, 0.0),  # above 1 + clip_high: flat at -A 1.28
        (0.5, 2.0, -1.0, -1.0),  # below, positive advantage: not clipped
        (0.9, -2.0, 1.8, 1.8),  # inside
        (0.5, -2.0, 1.6, 0.0),  # below 1 - clip_low: flat at -A 0.8
        (2.0, -2.0, 4.0, 4.0),  # above, negative advantage: not clipped by PPO
        (3.5, -2.0, 6.0, 0.0),  # dual clip: c |A| and no gradient
    ],
)
def test_every_region_of_the_clip(ratio, advantage, loss, gradient):
    logprobs = torch.tensor([math.log(ratio) - 1.0], requires_grad=True)
    result = clipped_policy_loss(logprobs, torch.tensor([-1.0]), torch.tensor([advantage]), **CLIP)
    result.loss.sum().backward()
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)
    assert logprobs.grad.item() == pytest.approx(gradient, rel=1e-5, abs=1e-7)


def test_without_dual_clip_a_negative_advantage_is_unbounded():
    options = {**CLIP, "dual_clip": None}
    result = clipped_policy_loss(torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([-1.0]), **options)
    assert result.loss.item() == pytest.approx(math.exp(2.0))
    assert result.dual_clipped.item() == 0


def test_log_ratio_is_clamped_before_exponentiation():
    result = clipped_policy_loss(torch.tensor([0.0]), torch.tensor([-500.0]), torch.tensor([1.0]), **CLIP)
    assert result.ratio.item() == pytest.approx(math.exp(20.0))


def test_tis_truncates_from_above_only_and_is_detached():
    old = torch.tensor([0.0, 0.0, 0.0], requires_grad=True)
    weights = tis_weights(old, torch.tensor([-2.0, 0.5, 0.0]), cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([2.0, math.exp(-0.5), 1.0]))
    assert not weights.requires_grad


def test_group_advantages_use_the_unbiased_deviation():
    assert group_advantages([1.0, 0.0, 0.0, 1.0]) == pytest.approx(
        [0.5 / (1 / math.sqrt(3) + 1e-6) * s for s in (1, -1, -1, 1)]
    )
    assert group_advantages([1.0, 0.0], normalize_by_std=False) == [0.5, -0.5]
    assert group_advantages([1.0, 1.0, 1.0]) == [0.0, 0.0, 0.0]
    assert group_advantages([0.3]) == [0.3]


@pytest.mark.parametrize(("length", "penalty"), [(10, 0.0), (16, 0.0), (18, -0.5), (20, -1.0)])
def test_overlong_penalty_is_linear_in_the_buffer(length, penalty):
    assert overlong_penalty(length, max_tokens=20, buffer=4, factor=1.0) == pytest.approx(penalty)
    assert overlong_penalty(length, max_tokens=20, buffer=0, factor=1.0) == 0.0


def _batch(num_sequences: int = 5) -> TrainBatch:
    generator = np.random.default_rng(0)
    return TrainBatch(
        tuple(
            TrainSequence(
                token_ids=generator.integers(0, 30, 4 + i).astype(np.int32),
                num_prompt_tokens=2,
                advantage=float(generator.normal()),
                rollout_logprobs=generator.normal(-3, 0.5, 2 + i).astype(np.float32),
                old_logprobs=generator.normal(-3, 0.5, 2 + i).astype(np.float32),
            )
            for i in range(num_sequences)
        )
    )


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("tis_cap", [None, 1.1])
def test_policy_loss_of_a_batch_matches_its_definition(aggregation, tis_cap):
    """Written out per sequence in float64, from dense logits; packed, weighted and summed in the product."""
    batch = _batch()
    logits = torch.randn(60, 30, generator=torch.Generator().manual_seed(0)) * 2
    (micro,) = make_microbatches(
        batch, data_rank=0, data_size=1, microbatch_tokens=1000, alignment=8, aggregation=aggregation
    )
    z = logits[: len(micro.tokens)].clone().requires_grad_()
    loss, metrics = policy_loss(
        VocabLogits(z, 30), micro, sampling_temperature=0.8, tis_cap=tis_cap, entropy_coef=0.0, **CLIP
    )
    loss.backward()

    dense = logits[: len(micro.tokens)].double().requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    start = 0
    for index in micro.sequence_indices:
        s = batch.sequences[index]
        rows = torch.arange(start + s.num_prompt_tokens - 1, start + len(s.token_ids) - 1)
        targets = torch.from_numpy(s.token_ids[s.num_prompt_tokens :].astype(np.int64))
        logprobs = (dense / 0.8).log_softmax(-1)[rows, targets]
        ratio = (logprobs - torch.from_numpy(s.old_logprobs).double()).exp()
        per_token = torch.maximum(-s.advantage * ratio, -s.advantage * ratio.clamp(0.8, 1.28))
        if s.advantage < 0:
            per_token = per_token.clamp_max(-s.advantage * 3.0)
        if tis_cap is not None:
            gap = torch.from_numpy(s.old_logprobs - s.rollout_logprobs).double()
            per_token = per_token * gap.exp().clamp_max(tis_cap)
        share = batch.num_valid_tokens if aggregation == "token_mean" else len(batch) * len(rows)
        expected = expected + per_token.sum() / share
        start += len(s.token_ids)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(z.grad.double(), dense.grad, rtol=1e-4, atol=1e-7)
    assert metrics.reduced()["policy/loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_padding_that_holds_nan_does_not_reach_the_loss():
    batch = _batch()
    (micro,) = make_microbatches(batch, data_rank=0, data_size=1, microbatch_tokens=1000, alignment=64)
    logits = torch.randn(64, 30)
    logits[batch.num_tokens :] = torch.nan
    loss, metrics = policy_loss(
        VocabLogits(logits, 30), micro, sampling_temperature=1.0, tis_cap=None, entropy_coef=0.1, **CLIP
    )
    assert loss.isfinite()
    assert all(math.isfinite(v) for v in metrics.reduced().values())
