"""The clipped policy loss of GRPO and DAPO, with dual clip and optional truncated importance sampling.

Shapes: every tensor is [T], one entry per packed token, float32. `loss_weights` are the tokens' shares in the batch's loss
(1 / global token count for a token mean), so a loss is a plain sum and does not depend on how the batch is cut.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_reheat.metrics import MetricSums
from megatron_reheat.parallel.packing import MicroBatch
from megatron_reheat.parallel.vocab import Vocabulary

# exp() of a larger log-ratio says nothing but "far away" and only risks overflow
MAX_LOG_RATIO = 20.0


class ClippedLoss(NamedTuple):
    """Per-token loss and what the clipping did to it; the three flags are 0/1 and carry no gradient."""

    loss: Tensor
    ratio: Tensor
    clipped_high: Tensor
    clipped_low: Tensor
    dual_clipped: Tensor


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> ClippedLoss:
    """PPO's pessimistic clipped surrogate per token, bounds [1 - clip_low, 1 + clip_high] (DAPO's clip-higher).

    `dual_clip` c > 1 caps the loss of a negative advantage at c |A|, and with it the gradient once the ratio exceeds c.
    """
    log_ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(unclipped, clipped)
    clip_active = clipped > unclipped
    dual_active = torch.zeros_like(clip_active)
    if dual_clip is not None:
        bound = -advantages * dual_clip
        dual_active = (advantages < 0) & (loss > bound)
        loss = torch.where(dual_active, bound, loss)
    return ClippedLoss(
        loss=loss,
        ratio=ratio,
        clipped_high=(clip_active & (advantages > 0)).float(),
        clipped_low=(clip_active & (advantages < 0)).float(),
        dual_clipped=dual_active.float(),
    )


def tis_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, *, cap: float) -> Tensor:
    """Token-level truncated importance weights min(pi_trainer / pi_rollout, cap), truncated from above only; detached."""
    log_ratio = (old_logprobs - rollout_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.exp().clamp_max(cap).detach()


def policy_loss(
    vocab: Vocabulary,
    micro: MicroBatch,
    *,
    sampling_temperature: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    tis_cap: float | None,
    entropy_coef: float,
) -> tuple[Tensor, MetricSums]:
    """Loss of one micro-batch and its metrics. Log-probabilities are taken at the temperature that sampled."""
    logprobs, entropy = vocab.logprobs(micro.targets, temperature=sampling_temperature)
    clipped = clipped_policy_loss(
        logprobs, micro.old_logprobs, micro.advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )
    per_token = clipped.loss
    truncated = torch.zeros_like(per_token)
    if tis_cap is not None:
        weights = tis_weights(micro.old_logprobs, micro.rollout_logprobs, cap=tis_cap)
        truncated = (weights >= tis_cap).float()
        per_token = per_token * weights
    if entropy_coef:
        per_token = per_token - entropy_coef * entropy
    # where, not multiplication: what padding positions hold must not reach the sum, whatever it is
    counted = micro.loss_mask.bool()
    loss = torch.where(counted, per_token, 0.0).mul(micro.loss_weights).sum()

    metrics = MetricSums()
    with torch.no_grad():
        log_ratio = torch.where(counted, logprobs - micro.old_logprobs, 0.0)
        rows = {
            "policy/clip_high_fraction": clipped.clipped_high,
            "policy/clip_low_fraction": clipped.clipped_low,
            "policy/dual_clip_fraction": clipped.dual_clipped,
            "policy/tis_truncated_fraction": truncated,
            "policy/ratio": clipped.ratio,
            "policy/kl_to_old": torch.expm1(-log_ratio) + log_ratio,
        }
        totals = torch.stack([torch.where(counted, row, 0.0).sum() for row in rows.values()]).tolist()
        count = int(counted.sum())
    for name, total in zip(rows, totals, strict=True):
        metrics.add_mean(name, total, count)
    metrics.add_sum("policy/loss", float(loss.detach()))
    return loss, metrics
