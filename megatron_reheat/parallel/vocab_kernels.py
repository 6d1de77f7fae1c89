"""Per-token sums over a vocabulary shard, and the gradient they imply: one dispatch point for three backends.

Triton on CUDA (`vocab_triton`); on a CPU plain PyTorch, and the same code through torch.compile where the work is worth the
seconds that compiling takes: fused into one loop it is about three times as fast (`scripts/bench_kl.py`).

They see one rank's logits [N, C] without padding columns and communicate nothing; between them the shards' sums are
gathered and merged. With d = z - m:

    shard_sums      m = max z,  s1 = sum e^d,  w1 = sum e^d d,  sT = sum e^(d/T),  wT = sum e^(d/T) d,  z_y
    write_gradient  g_v = target (1[v=y] - p_v) + entropy q_v (d_v - M1) + contrast (q_v - p_v)

with q = e^(d - A1) the policy and p = e^(d/T - AT) its tempered self; every loss of the package is a choice of the three
coefficients. Differences of nearly equal probabilities are taken through expm1: float32 keeps its digits on sharp policies.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from megatron_reheat.parallel import vocab_triton
from megatron_reheat.parallel.vocab_rows import RowCoefficients, RowScalars

logger = logging.getLogger(__name__)

NUM_SUMS = 6
LOWEST = torch.finfo(torch.float32).min
# below this e^d is zero in any dtype; finite, so that 0 x d stays 0 where a logit is -inf
NO_PROBABILITY = -1e30

# Elements that plain PyTorch works on at a time: what stays in a core's cache between the passes over it on a CPU, and
# what keeps a GPU busy without large temporaries.
_CPU_BLOCK = 1 << 18
_GPU_BLOCK = 1 << 26
# Compiled code passes over a row in registers and wants many rows at a time.
_COMPILED_BLOCK = 1 << 21
_COMPILE_FROM_COLUMNS = 4096
_COMPILE_FROM_ELEMENTS = 1 << 22


def shard_sums(logits: Tensor, local_targets: Tensor | None, temperature: float) -> Tensor:
    """[N, C] logits, [N] column of the target (any value outside [0, C) if elsewhere) -> [6, N] float64.

    A shard without columns or a target that lies elsewhere contributes nothing when the shards are merged.
    """
    sums = torch.zeros(NUM_SUMS, logits.size(0), dtype=torch.float64, device=logits.device)
    sums[0] = LOWEST  # a shard that is all padding never owns the maximum
    if logits.numel() == 0:
        return sums
    if vocab_triton.supports(logits):
        vocab_triton.shard_sums(sums, logits, local_targets, temperature)
        return sums
    logits = logits.detach()  # compiled code is specialized on whether its inputs require gradients
    plan = _plan(logits)
    for rows in plan.blocks:
        sums[:5, rows] = plan.sums(logits[rows], temperature)
    if local_targets is not None:
        sums[5] = _target_logits(logits, local_targets)
    return sums


def merge(shards: Tensor, temperature: float) -> RowScalars:
    """[TP, 6, N] -> scalars: an online-softmax merge in rank order, so that every rank gets bitwise the same result."""
    maximum = shards[:, 0].amax(0)
    down = shards[:, 0] - maximum  # <= 0: how far each shard's maximum lies below the global one
    scale, tempered_scale = down.exp(), (down / temperature).exp()
    s1 = (shards[:, 1] * scale).sum(0)
    w1 = ((shards[:, 2] + shards[:, 1] * down) * scale).sum(0)
    s_t = (shards[:, 3] * tempered_scale).sum(0)
    w_t = ((shards[:, 4] + shards[:, 3] * down) * tempered_scale).sum(0)
    return RowScalars(maximum, s1.log(), w1 / s1, s_t.log(), w_t / s_t, shards[:, 5].sum(0) - maximum)


def write_gradient(
    out: Tensor,
    logits: Tensor,
    local_targets: Tensor | None,
    scalars: RowScalars,
    coefficients: RowCoefficients,
    temperature: float,
) -> None:
    """Writes g [N, C] into `out`, which may be `logits` itself."""
    if logits.numel() == 0:
        return
    if vocab_triton.supports(logits):
        vocab_triton.write_gradient(out, logits, local_targets, scalars, coefficients, temperature)
        return
    logits = logits.detach()
    plan = _plan(logits)
    for rows in plan.blocks:
        targets = None if local_targets is None else local_targets[rows]
        out[rows] = plan.gradient(logits[rows], targets, scalars.rows(rows), coefficients.rows(rows), temperature)


def _sums(logits: Tensor, temperature: float) -> Tensor:
    maximum = logits.amax(-1).to(compute_dtype(logits)).clamp_min(LOWEST)
    shifted = _shifted(logits, maximum)
    exp = shifted.exp()
    s1 = exp.sum(-1, dtype=torch.float64)
    w1 = exp.mul_(shifted).sum(-1, dtype=torch.float64)
    if temperature == 1:
        return torch.stack([maximum.double(), s1, w1, s1, w1])
    tempered = torch.mul(shifted, 1.0 / temperature, out=exp).exp_()
    s_t = tempered.sum(-1, dtype=torch.float64)
    w_t = tempered.mul_(shifted).sum(-1, dtype=torch.float64)
    return torch.stack([maximum.double(), s1, w1, s_t, w_t])


def _target_logits(logits: Tensor, local_targets: Tensor) -> Tensor:
    owned = (local_targets >= 0) & (local_targets < logits.size(-1))
    values = logits.gather(-1, local_targets.clamp(0, logits.size(-1) - 1)[:, None])[:, 0].double()
    return torch.where(owned, values, 0.0)


def _gradient(
    logits: Tensor, local_targets: Tensor | None, scalars: RowScalars, coefficients: RowCoefficients, temperature: float
) -> Tensor:
    d = _shifted(logits, scalars.maximum)

    def column(values: Tensor) -> Tensor:
        return values[:, None].to(d.dtype)

    gradient = None
    if coefficients.contrast is not None:
        # q - p without cancellation: the larger of the two times (1 - ratio), the ratio in log space
        gap = scalars.tempered_log_sum - scalars.log_sum
        log_ratio = torch.mul(d, 1.0 - 1.0 / temperature).add_(column(gap))  # log q - log p
        larger = (d - column(scalars.log_sum)).sub_(log_ratio.clamp_max(0.0)).exp_()
        sign = log_ratio.sign()
        difference = log_ratio.abs_().neg_().expm1_().mul_(larger).mul_(sign)
        gradient = difference.mul_(column(-coefficients.contrast))
    if coefficients.target is not None:
        assert local_targets is not None
        log_p = torch.mul(d, 1.0 / temperature).sub_(column(scalars.tempered_log_sum))
        term = _logprob_gradient(log_p, local_targets).mul_(column(coefficients.target))
        gradient = term if gradient is None else gradient.add_(term)
    if coefficients.entropy is not None:
        term = (d - column(scalars.log_sum)).exp_()
        term.mul_(d.sub_(column(scalars.mean))).mul_(column(coefficients.entropy))
        gradient = term if gradient is None else gradient.add_(term)
    return torch.zeros_like(d) if gradient is None else gradient


def _logprob_gradient(log_p: Tensor, local_targets: Tensor) -> Tensor:
    """[N, C] 1[v = y] - p_v; at a nearly certain target 1 - p cancels in float32, expm1 keeps it."""
    owned = (local_targets >= 0) & (local_targets < log_p.size(-1))
    ids = local_targets.clamp(0, log_p.size(-1) - 1)[:, None]
    at_target = -torch.expm1(log_p.gather(-1, ids))
    gradient = log_p.exp_().neg_()
    return gradient.scatter_(-1, ids, torch.where(owned[:, None], at_target, gradient.gather(-1, ids)))


def _shifted(logits: Tensor, maximum: Tensor) -> Tensor:
    """[N, C] d = z - m, finite also where z is -inf; NaN stays NaN."""
    dtype = compute_dtype(logits)
    return (logits.to(dtype) - maximum[:, None].to(dtype)).clamp_min_(NO_PROBABILITY)


def compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Plan:
    """How a CPU, or a GPU without Triton, goes through the logits."""

    blocks: list[slice]
    sums: Callable[..., Tensor] = _sums
    gradient: Callable[..., Tensor] = _gradient


def _plan(logits: Tensor) -> _Plan:
    if logits.is_cuda:
        return _Plan(_row_blocks(logits, _GPU_BLOCK))
    is_large = logits.size(-1) >= _COMPILE_FROM_COLUMNS and logits.numel() >= _COMPILE_FROM_ELEMENTS
    compiled = _compiled() if is_large and logits.dtype != torch.float64 else None
    if compiled is None:
        return _Plan(_row_blocks(logits, _CPU_BLOCK))
    return _Plan(_row_blocks(logits, _COMPILED_BLOCK), *compiled)


@cache
def _compiled() -> tuple[Callable[..., Tensor], Callable[..., Tensor]] | None:
    """The plain functions through torch.compile, or None where that does not work (it needs a C++ compiler)."""
    sums, gradient = torch.compile(_sums, dynamic=True), torch.compile(_gradient, dynamic=True)
    try:
        sums(torch.zeros(2, 64), 1.5)
    except Exception as error:
        logger.warning("the tempered KL runs uncompiled, about three times slower: %s", str(error).splitlines()[0])
        return None
    return sums, gradient


def _row_blocks(logits: Tensor, elements: int) -> list[slice]:
    size = max(1, elements // logits.size(-1))
    return [slice(i, min(i + size, logits.size(0))) for i in range(0, logits.size(0), size)]
