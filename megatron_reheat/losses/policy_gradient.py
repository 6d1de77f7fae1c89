"""Policy losses: a surrogate of the policy gradient per token, that of GRPO and DAPO first, and what goes with every one of
them: truncated importance sampling, an entropy bonus, the KL to a reference policy, and metrics.

Shapes: every tensor is [T], one entry per packed token, float32. `loss_weights` are the tokens' shares in the batch's loss
(1 / global token count for a token mean), so a loss is a plain sum and does not depend on how the batch is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_reheat.losses.reference_kl import MAX_LOG_RATIO, KLEstimator, reference_kl
from megatron_reheat.metrics import MetricSums
from megatron_reheat.parallel.packing import MicroBatch
from megatron_reheat.parallel.vocab import Vocabulary

REF_LOGPROBS = "ref_logprobs"  # the column of the reference policy's log-probabilities


def log_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """log(pi / pi_old) of each token, within what exp() takes."""
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


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
    ratio = log_ratio(logprobs, old_logprobs).exp()
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


def importance_weights(old_logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """pi_trainer / pi_rollout of each token; detached."""
    return log_ratio(old_logprobs, rollout_logprobs).exp().detach()


def token_importance(micro: MicroBatch) -> Tensor:
    """The old policy's weight of each token that another one sampled."""
    return importance_weights(micro.old_logprobs, micro.rollout_logprobs)


class Surrogate(NamedTuple):
    """A policy gradient's loss per token, and what its metrics are the token means of, by name, without gradient."""

    loss: Tensor
    rows: dict[str, Tensor]


SurrogateLoss = Callable[[Tensor, MicroBatch], Surrogate]  # from the log-probabilities [T] that carry the gradient


def clipped_surrogate(
    logprobs: Tensor, micro: MicroBatch, *, clip_low: float, clip_high: float, dual_clip: float | None
) -> Surrogate:
    """That of GRPO and DAPO."""
    clipped = clipped_policy_loss(
        logprobs, micro.old_logprobs, micro.advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )
    rows = {
        "policy/clip_high_fraction": clipped.clipped_high,
        "policy/clip_low_fraction": clipped.clipped_low,
        "policy/dual_clip_fraction": clipped.dual_clipped,
    }
    return Surrogate(clipped.loss, rows)


def policy_loss(
    vocab: Vocabulary,
    micro: MicroBatch,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    **others: Any,
) -> tuple[Tensor, MetricSums]:
    """`surrogate_loss` of the clipped surrogate, whose other arguments it takes, too."""
    clipped = partial(clipped_surrogate, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    return surrogate_loss(vocab, micro, surrogate=clipped, **others)


def surrogate_loss(
    vocab: Vocabulary,
    micro: MicroBatch,
    *,
    surrogate: SurrogateLoss,
    sampling_temperature: float,
    tis_cap: float | None,
    entropy_coef: float,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    importance: Callable[[MicroBatch], Tensor] = token_importance,
) -> tuple[Tensor, MetricSums]:
    """Loss of one micro-batch and its metrics. Log-probabilities are taken at the temperature that sampled.

    With `tis_cap`, the surrogate counts by `importance`, truncated there, from above only.
    With `kl_coef`, the column `REF_LOGPROBS` is there; the KL is not importance-weighted, as in verl.

    Metrics are means over the sampled tokens, so their expectations are under the policy that sampled. The exceptions are
    `policy/kl_to_old`, an unbiased estimate of KL(pi_old || pi) in nats per token, which is never negative: the mean of
    r - 1 - log r with r = pi / pi_old, for tokens drawn from pi_old; and `policy/kl_to_ref`, which is the same of
    KL(pi_old || pi_ref), with r = pi_ref / pi_old. With `tis_cap` the tokens are not taken to be drawn from pi_old, and count
    by their importance weights, which are not truncated here.
    """
    logprobs, entropy = vocab.logprobs(micro.targets, temperature=sampling_temperature)
    micro = micro.scored(logprobs, entropy)
    per_token, rows = surrogate(logprobs, micro)
    weights, truncated = torch.ones_like(per_token), torch.zeros_like(per_token)
    if tis_cap is not None:
        weights = importance(micro)
        per_token = per_token * weights.clamp_max(tis_cap)
        truncated = (weights > tis_cap).float()
    if entropy_coef:
        per_token = per_token - entropy_coef * entropy
    if kl_coef:
        per_token = per_token + kl_coef * reference_kl(logprobs, micro.extra[REF_LOGPROBS], kl_estimator)
    # where, not multiplication: what padding positions hold must not reach the sum, whatever it is
    counted = micro.loss_mask.bool()
    loss = torch.where(counted, per_token, 0.0).mul(micro.loss_weights).sum()

    metrics = MetricSums()
    with torch.no_grad():
        rows = {
            **rows,
            "policy/tis_truncated_fraction": truncated,
            "policy/ratio": log_ratio(logprobs, micro.old_logprobs).exp(),
            "policy/kl_to_old": _k3_in_double(logprobs - micro.old_logprobs, counted) * weights,
        }
        if kl_coef:
            gap = micro.extra[REF_LOGPROBS] - micro.old_logprobs
            rows["policy/kl_to_ref"] = _k3_in_double(gap, counted) * weights
        totals = torch.stack(
            [torch.where(counted, row, 0.0).sum(dtype=torch.float64) for row in rows.values()]
        ).tolist()
        count = int(counted.sum())
    for name, total in zip(rows, totals, strict=True):
        metrics.add_mean(name, total, count)
    # a share of its minibatch's loss, whose weights sum to 1: over several minibatches this is their mean
    metrics.add_mean("policy/loss", float(loss.detach()), float(micro.loss_weights.sum()))
    return loss, metrics


def _k3_in_double(log_ratios: Tensor, counted: Tensor) -> Tensor:
    """r - 1 - log r, where counted; in float32, two nearly equal policies would leave nothing of it."""
    exact = torch.where(counted, log_ratios, 0.0).double()
    return torch.expm1(exact) - exact
