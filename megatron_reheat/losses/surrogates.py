"""Surrogates besides PPO's clip (`losses.policy_gradient`): what each does with ratio and advantage of a token.

Shapes: every tensor is [T], one entry per packed token, float32. Flags in `rows` are 0/1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megatron_reheat.losses.policy_gradient import Surrogate, SurrogateLoss, log_ratio
from megatron_reheat.parallel.packing import MicroBatch

SELECTED = "selected"  # the column of tokens that a covariance method treats apart, 0/1

Divergence = Literal["tv", "kl"]


def sequence_clipped(logprobs: Tensor, micro: MicroBatch, *, clip_low: float, clip_high: float) -> Surrogate:
    """GSPO: PPO's clip of the response's ratio s = exp(mean_t log(pi / pi_old)).

    Written per token, as GSPO-token: the ratio is sg(s) pi / sg(pi), whose value is s at every token of the response. With one
    advantage a response, value and gradient of the response's mean are those of min(s A, clip(s) A). The responses must be
    whole (`GRPO.whole_sequences`).
    """
    gaps = log_ratio(logprobs, micro.old_logprobs)
    mean_gap = _response_means(gaps.detach(), micro)
    ratio = (mean_gap + logprobs - logprobs.detach()).exp()
    unclipped = -micro.advantages * ratio
    clipped = -micro.advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    is_clipped = clipped > unclipped
    rows = {
        "gspo/clip_high_fraction": (is_clipped & (micro.advantages > 0)).float(),
        "gspo/clip_low_fraction": (is_clipped & (micro.advantages < 0)).float(),
        "gspo/ratio_deviation": (ratio.detach() - 1).abs(),
    }
    return Surrogate(torch.maximum(unclipped, clipped), rows)


def response_importance(micro: MicroBatch) -> Tensor:
    """GSPO: the geometric mean of the old policy's weights of a response's tokens, which another policy sampled."""
    return _response_means(log_ratio(micro.old_logprobs, micro.rollout_logprobs), micro).exp()


def _response_means(values: Tensor, micro: MicroBatch) -> Tensor:
    """[T] -> [T]: at every token of a sequence, the mean over its response."""
    borders = micro.cu_seqlens.long()
    assert len(values) == int(borders[-1]), "a part of a micro-batch does not hold whole sequences"
    counted = micro.loss_mask.double()
    owner = torch.repeat_interleave(torch.arange(len(borders) - 1, device=values.device), borders.diff())
    sums = torch.zeros(2, len(borders) - 1, dtype=torch.float64, device=values.device)
    sums.index_add_(1, owner, torch.stack([torch.where(micro.loss_mask.bool(), values, 0.0).double(), counted]))
    sums = micro.total(sums)
    return (sums[0] / sums[1].clamp_min(1))[owner].to(values.dtype)


def weight_clipped(logprobs: Tensor, micro: MicroBatch, *, eps_low: float, eps_high: float) -> Surrogate:
    """CISPO: REINFORCE with the importance weight clipped and detached, so that no token loses its gradient."""
    ratio = log_ratio(logprobs.detach(), micro.old_logprobs).exp()
    weight = ratio.clamp(1 - eps_low, 1 + eps_high)
    rows = {"cispo/weight_clipped_fraction": (weight != ratio).float(), "cispo/weight": weight}
    return Surrogate(-weight * micro.advantages * logprobs, rows)


def softly_gated(logprobs: Tensor, micro: MicroBatch, *, tau_positive: float, tau_negative: float) -> Surrogate:
    """SAPO: (4 / tau) sigmoid(tau (r - 1)) in the ratio's place, whose gradient is 4 p (1 - p) r grad log pi with p the
    sigmoid: one at r = 1, and fading on both sides. Tokens without advantage have none either way."""
    ratio = log_ratio(logprobs, micro.old_logprobs).exp()
    tau = torch.where(micro.advantages > 0, tau_positive, tau_negative)
    gate = torch.sigmoid(tau * (ratio - 1))
    rows = {"sapo/gate": 4 * gate.detach() * (1 - gate.detach())}
    return Surrogate(-micro.advantages * gate * 4 / tau, rows)


def divergence_masked(
    logprobs: Tensor, micro: MicroBatch, *, divergence: Divergence, delta_low: float, delta_high: float
) -> Surrogate:
    """DPPO: the ratio to the policy that sampled, and no gradient for a token that leads further away once its divergence
    from that policy, as of a coin that shows the sampled token or another, exceeds delta.

    tv: |pi - mu|        kl: mu log(mu / pi) + (1 - mu) log((1 - mu) / (1 - pi))
    """
    now, then = logprobs.detach().double(), micro.rollout_logprobs.double()
    shift = now.exp() - then.exp()
    distance = shift.abs() if divergence == "tv" else binary_kl(then, now)
    leaves_high = (micro.advantages > 0) & (shift > 0) & (distance > delta_high)
    leaves_low = (micro.advantages < 0) & (shift < 0) & (distance > delta_low)
    ratio = log_ratio(logprobs, micro.rollout_logprobs).exp()
    loss = torch.where(leaves_high | leaves_low, 0.0, -micro.advantages * ratio)
    rows = {
        "dppo/mask_high_fraction": leaves_high.float(),
        "dppo/mask_low_fraction": leaves_low.float(),
        "dppo/divergence": distance,
        "dppo/ratio": ratio.detach(),
    }
    return Surrogate(loss, rows)


def binary_kl(first: Tensor, second: Tensor) -> Tensor:
    """KL between two coins, from log-probabilities of heads; float64."""
    tiny = torch.finfo(torch.float64).tiny
    p, tails, other_tails = first.exp(), -first.expm1(), -second.expm1()
    return p * (first - second) + torch.xlogy(tails, tails / other_tails.clamp_min(tiny))


def without_selected(logprobs: Tensor, micro: MicroBatch, *, surrogate: SurrogateLoss) -> Surrogate:
    """Clip-Cov: `surrogate`, from whose loss the selected tokens are taken out."""
    loss, rows = surrogate(logprobs, micro)
    selected = micro.extra[SELECTED].bool()
    return Surrogate(torch.where(selected, 0.0, loss), {**rows, "clip_cov/detached_fraction": selected.float()})


def selected_held(logprobs: Tensor, micro: MicroBatch, *, coef: float) -> Surrogate:
    """KL-Cov: the plain ratio, and for selected tokens coef |log(pi / pi_old)| on top."""
    gaps = log_ratio(logprobs, micro.old_logprobs)
    selected = micro.extra[SELECTED]
    penalty = coef * selected * gaps.abs()
    rows = {"kl_cov/selected_fraction": selected, "kl_cov/penalty": penalty.detach()}
    return Surrogate(-micro.advantages * gaps.exp() + penalty, rows)
