"""SDPG (arXiv 2606.04036): a distillation from the policy's privileged self, and an anchor to a frozen reference policy.

Shapes: every tensor is [T], one entry per packed token, float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from megatron_reheat.losses.policy_gradient import (
    MAX_LOG_RATIO,
    REF_LOGPROBS,
    Surrogate,
    SurrogateLoss,
    importance_weights,
)
from megatron_reheat.metrics import MetricSums
from megatron_reheat.parallel.packing import MicroBatch
from megatron_reheat.parallel.vocab import Vocabulary

Anchor = Literal["UFKL", "URKL", "FKL", "RKL"]

HINTED = "hinted"  # the column that is 1 where the teacher's prompt knows more, 0 where it is the policy's own
TEACHER = "teacher"  # the reading behind the teacher's prompt
MAX_KL = 20.0  # nats: a token that is further away has no gradient


def reference_anchor(log_w: Tensor, kind: Anchor) -> Tensor:
    """f(w) per token, from log w = log(pi / pi_ref), which is clamped to +-20.

    UFKL  1/w + log w    URKL  (log w)^2 / 2    FKL  1/w    RKL  (log w + 1)^2 / 2

    Over tokens that the policy sampled, the gradients of UFKL and FKL are those of KL(pi_ref || pi), those of URKL and RKL
    that of KL(pi || pi_ref), in the mean; those marked U are zero for every token where w = 1.
    """
    log_w = log_w.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    match kind:
        case "UFKL":
            return (-log_w).exp() + log_w
        case "URKL":
            return 0.5 * log_w.square()
        case "FKL":
            return (-log_w).exp()
    return 0.5 * (log_w + 1).square()


def sdpg_loss(
    vocab: Vocabulary,
    micro: MicroBatch,
    *,
    policy: Callable[..., tuple[Tensor, MetricSums]],
    surrogate: SurrogateLoss,
    temperature: float,
    beta: float,
    gate: bool,
    alpha: float,
    anchor: Anchor,
    importance_weighted: bool,
) -> tuple[Tensor, MetricSums]:
    """`losses.policy_gradient.surrogate_loss` (`policy`) of `surrogate` + beta x gated KL(student || teacher) + alpha x anchor.

    The last two count by pi / pi_old, detached, if `importance_weighted`. `temperature` is that of both sides of the KL. The
    metric `sdpg/teacher_kl` is the mean over distilled tokens, before the clamp at 20; `sdpg/ref_log_ratio` that of log w over
    all, an estimate of KL(pi || pi_ref) where pi sampled them.
    """
    distilled = micro.loss_mask.bool() & (micro.extra[HINTED] > 0)
    if gate:
        distilled &= micro.advantages > 0
    kl = vocab.kl_to(micro.readings[TEACHER], temperature=temperature)

    def with_terms(logprobs: Tensor, micro: MicroBatch) -> Surrogate:
        per_token, rows = surrogate(logprobs, micro)
        terms = beta * torch.where(distilled, kl.clamp_max(MAX_KL), 0.0)
        rows = {**rows, "sdpg/distilled_fraction": distilled.float()}
        if alpha:
            log_w = logprobs - micro.extra[REF_LOGPROBS]
            f = reference_anchor(log_w, anchor)
            terms = terms + alpha * f
            rows |= {"sdpg/ref_log_ratio": log_w.detach(), "sdpg/anchor": f.detach()}
        if importance_weighted:
            terms = terms * importance_weights(logprobs, micro.old_logprobs)
        return Surrogate(per_token + terms, rows)

    loss, metrics = policy(vocab, micro, surrogate=with_terms)
    with torch.no_grad():
        seen = kl[distilled].double()
    metrics.add_mean("sdpg/teacher_kl", float(seen.sum()), len(seen))
    metrics.add_mean("sdpg/clamped_fraction", float((seen > MAX_KL).sum()), len(seen))
    return loss, metrics
