"""GRPO/DAPO: closed-form values and gradients, the clip in every region, advantages, overlong shaping, TIS."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_reheat.losses.advantage import group_advantages, overlong_penalty
from megatron_reheat.losses.policy_gradient import clipped_policy_loss, importance_weights, policy_loss
from megatron_reheat.losses.reheat import reheat_loss
from megatron_reheat.parallel.packing import MicroBatch, make_microbatches
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


def test_importance_weights_are_detached():
    old = torch.tensor([0.0, 0.0, 0.0], requires_grad=True)
    weights = importance_weights(old, torch.tensor([-2.0, 0.5, 0.0]))
    torch.testing.assert_close(weights, torch.tensor([math.exp(2.0), math.exp(-0.5), 1.0]))
    assert not weights.requires_grad


def test_group_advantages_use_the_unbiased_deviation():
    assert group_advantages([1.0, 0.0, 0.0, 1.0]) == pytest.approx(
        [0.5 / (1 / math.sqrt(3) + 1e-6) * s for s in (1, -1, -1, 1)]
    )
    assert group_advantages([1.0, 0.0], normalize_by_std=False) == [0.5, -0.5]
    assert group_advantages([1.0, 1.0, 1.0]) == [0.0, 0.0, 0.0]
    assert group_advantages([0.3]) == [0.3]


@pytest.mark.parametrize("reward", [0.05, 0.1, 0.7])  # whose mean over three is rounded to another number
def test_equal_rewards_have_no_advantage_at_all(reward):
    assert group_advantages([reward] * 3) == [0.0] * 3


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


# -- metrics against the exact values of small categoricals ----------------------------------------------------------------

OLD, ROLLOUT, NEW = (np.array(p) / 16 for p in ([8, 4, 2, 2], [4, 4, 6, 2], [11, 2, 2, 1]))


def _sampled(policy: np.ndarray, advantage: float = 1.0, **logprobs: np.ndarray) -> tuple[VocabLogits, MicroBatch]:
    """Responses of one token in exactly the proportions of `policy`, so that a mean over them is an exact expectation;
    the trainer's logits are NEW's at temperature 0.8. `logprobs` gives the policies behind the recorded ones."""
    tokens = np.repeat(np.arange(4), (policy * 16).astype(int))
    recorded = {name: np.log(p).astype(np.float32) for name, p in logprobs.items()}
    batch = TrainBatch(
        tuple(
            TrainSequence(np.array([0, t], np.int32), 1, advantage, **{n: p[t : t + 1] for n, p in recorded.items()})
            for t in tokens
        )
    )
    (micro,) = make_microbatches(batch, data_rank=0, data_size=1, microbatch_tokens=100, alignment=1)
    logits = torch.from_numpy(0.8 * np.log(NEW)).float().expand(32, 4)
    return VocabLogits(logits, 4), micro


def _policy_metrics(vocab: VocabLogits, micro: MicroBatch, tis_cap: float | None = None) -> dict[str, float]:
    options = {"sampling_temperature": 0.8, "tis_cap": tis_cap, "entropy_coef": 0.0, **CLIP, "dual_clip": 1.3}
    return policy_loss(vocab, micro, **options)[1].reduced()


def _kl(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.sum(first * np.log(first / second)))


def test_kl_to_old_is_the_kl_from_the_old_policy_that_sampled():
    vocab, micro = _sampled(OLD, old_logprobs=OLD, rollout_logprobs=OLD)
    metrics = _policy_metrics(vocab, micro)
    assert metrics["policy/kl_to_old"] == pytest.approx(_kl(OLD, NEW), rel=1e-6)
    assert metrics["policy/kl_to_old"] != pytest.approx(_kl(NEW, OLD), rel=1e-2)
    assert metrics["policy/ratio"] == pytest.approx(1.0, rel=1e-6)


def test_kl_to_old_of_samples_from_another_policy_is_importance_weighted():
    vocab, micro = _sampled(ROLLOUT, old_logprobs=OLD, rollout_logprobs=ROLLOUT)
    metrics = _policy_metrics(vocab, micro, tis_cap=1.5)
    assert metrics["policy/kl_to_old"] == pytest.approx(_kl(OLD, NEW), rel=1e-6)
    assert metrics["policy/tis_truncated_fraction"] == pytest.approx(ROLLOUT[OLD / ROLLOUT > 1.5].sum())
    assert _policy_metrics(vocab, micro, tis_cap=1.0)["policy/tis_truncated_fraction"] == pytest.approx(4 / 16)


def test_kl_to_old_of_nearly_equal_policies_keeps_its_digits():
    near = NEW * (1 + 1e-4 * np.array([1, -3, 2, -9]))
    vocab, micro = _sampled(OLD, old_logprobs=near / near.sum(), rollout_logprobs=OLD)
    r = vocab.logprobs(micro.targets, temperature=0.8).logprobs.double() - micro.old_logprobs.double()
    expected = (torch.expm1(r) - r)[micro.loss_mask.bool()].mean().item()
    assert 0 < expected < 1e-6
    assert _policy_metrics(vocab, micro)["policy/kl_to_old"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_clip_fractions_are_the_probabilities_of_being_clipped(advantage):
    metrics = _policy_metrics(*_sampled(OLD, advantage, old_logprobs=OLD, rollout_logprobs=OLD))
    ratio = NEW / OLD
    expected = {
        "policy/clip_high_fraction": OLD[(ratio > 1.28) & (advantage > 0)].sum(),
        "policy/clip_low_fraction": OLD[(ratio < 0.8) & (advantage < 0)].sum(),
        "policy/dual_clip_fraction": OLD[(ratio > 1.3) & (advantage < 0)].sum(),
        "policy/tis_truncated_fraction": 0.0,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_reheating_metrics_are_those_of_the_policy_at_temperature_one(direction):
    vocab, micro = _sampled(ROLLOUT, rollout_logprobs=ROLLOUT)
    metrics = reheat_loss(vocab, micro, teacher_temperature=1.2, direction=direction)[1].reduced()
    student, teacher = NEW**0.8 / (NEW**0.8).sum(), NEW ** (0.8 / 1.2) / (NEW ** (0.8 / 1.2)).sum()
    expected = {
        "rollout/mismatch_kl": _kl(ROLLOUT, student),
        "rollout/mismatch_abs_mean": float(np.sum(ROLLOUT * abs(np.log(student / ROLLOUT)))),
        "rollout/mismatch_abs_max": float(abs(np.log(student / ROLLOUT)).max()),
        "entropy/mean": -float(np.sum(student * np.log(student))),
        "reheat/teacher_entropy": -float(np.sum(teacher * np.log(teacher))),
        "reheat/kl": _kl(teacher, student) if direction == "forward" else _kl(student, teacher),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)
