"""Per-token sums over a vocabulary shard, and the gradient they imply: one dispatch point for three backends.

Triton on CUDA (`vocab_triton`); on a CPU plain PyTorch, and the same code through torch.compile where the work is worth the
seconds that compiling takes: fused into one loop it is about three times as fast (`scripts/bench_kl.py`).

They see one rank's logits [N, C] without padding columns and communicate nothing; between them the shards' sums are
gathered and merged. With d = z - m:

    shard_sums      m = max z,  r1 = sum e^d - 1,  w1 = sum e^d d,  rT = sum e^(d/T) - 1,  wT = sum e^(d/T) d,  z_y
    write_gradient  g_v = target (1[v=y] - p_v) + entropy q_v (d_v - M1) + contrast (q_v - p_v)

with q = e^(d - A1) the policy and p = e^(d/T - AT) its tempered self; every loss of the package is a choice of the three
coefficients. A policy that is nearly certain keeps its digits: r1 and rT leave out one maximum, whose e^0 = 1 would swallow
them, and differences of nearly equal probabilities are taken through e^x - 1, never by subtraction.
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
# Compiled code makes no temporaries; it passes over a block once for the maxima and once for the rest.
_COMPILED_BLOCK = 1 << 20
_COMPILE_FROM_COLUMNS = 4096
_COMPILE_FROM_ELEMENTS = 1 << 22


def shard_sums(logits: Tensor, local_targets: Tensor | None, temperature: float) -> Tensor:
    """[N, C] logits, [N] column of the target (any value outside [0, C) if elsewhere) -> [6, N] float64.

    A shard without columns or a target that lies elsewhere contributes nothing when the shards are merged.
    """
    sums = torch.zeros(NUM_SUMS, logits.size(0), dtype=torch.float64, device=logits.device)
    sums[0] = LOWEST  # a shard that is all padding never owns the maximum,
    sums[1] = sums[3] = -1.0  # and its exponentials add up to nothing
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
    owner = shards[:, 0].argmax(0, keepdim=True)  # whose maximum is the one left out

    def log_and_mean(rest: Tensor, weighted: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        scale = (down / temperature).exp()
        others = scale.scatter(0, owner, 0.0)
        r = (rest * scale).sum(0) + others.sum(0)
        w = ((weighted + (1.0 + rest) * down) * scale).sum(0)
        return r.log1p(), w / (1.0 + r)

    log_sum, mean = log_and_mean(shards[:, 1], shards[:, 2], 1.0)
    tempered_log_sum, tempered_mean = log_and_mean(shards[:, 3], shards[:, 4], temperature)
    return RowScalars(maximum, log_sum, mean, tempered_log_sum, tempered_mean, shards[:, 5].sum(0) - maximum)


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
        into, block = out_and_input(out, logits, rows)
        plan.gradient(into, block, targets, scalars.rows(rows), coefficients.rows(rows), temperature)


def _sums(logits: Tensor, temperature: float) -> Tensor:
    maximum = _maxima(logits)
    shifted = _shifted(logits, maximum)
    num_maxima = (shifted == 0).sum(-1, dtype=torch.int32)
    exp = shifted.exp().mul_(_below_maximum(shifted))
    r1 = exp.sum(-1, dtype=torch.float64)
    w1 = exp.mul_(shifted).sum(-1, dtype=torch.float64)
    if temperature == 1:
        return _stacked(maximum, num_maxima, r1, w1, r1, w1)
    tempered = torch.mul(shifted, 1.0 / temperature, out=exp).exp_().mul_(_below_maximum(shifted))
    r_t = tempered.sum(-1, dtype=torch.float64)
    w_t = tempered.mul_(shifted).sum(-1, dtype=torch.float64)
    return _stacked(maximum, num_maxima, r1, w1, r_t, w_t)


def _below_maximum(shifted: Tensor) -> Tensor:
    """1 where `shifted` is negative, 0 where it is zero; to fill by a mask takes ten times as long."""
    return shifted.sign().neg_()


def _sums_to_compile(logits: Tensor, temperature: float) -> Tensor:
    """The same in float32, one from each quarter of the row added up before they go into float64: to convert every term costs
    a quarter of the pass, and these additions round no more than the exponentials do."""
    maximum = _maxima(logits)

    def terms(columns: Tensor) -> tuple[Tensor, ...]:
        d = _shifted(columns, maximum)
        at_maximum = d == 0
        exp = d.exp().masked_fill(at_maximum, 0.0)
        plain = (at_maximum.to(torch.int32), exp, exp * d)
        if temperature == 1:
            return plain
        tempered = (d * (1.0 / temperature)).exp().masked_fill(at_maximum, 0.0)
        return *plain, tempered, tempered * d

    quarter = logits.size(-1) // 4
    a, b, c, d = (terms(logits[:, k * quarter : (k + 1) * quarter]) for k in range(4))
    sums = [_total((w + x) + (y + z)) for w, x, y, z in zip(a, b, c, d, strict=True)]
    if logits.size(-1) % 4:
        rest = map(_total, terms(logits[:, 4 * quarter :]))
        sums = [total + more for total, more in zip(sums, rest, strict=True)]
    num_maxima, r1, w1, *tempered = sums
    return _stacked(maximum, num_maxima, r1, w1, *(tempered or (r1, w1)))


def _stacked(maximum: Tensor, num_maxima: Tensor, r1: Tensor, w1: Tensor, r_t: Tensor, w_t: Tensor) -> Tensor:
    """[5, N]: every maximum has left the sums, and all but one come back as the ones they are."""
    ties = num_maxima.double() - 1.0
    return torch.stack([maximum.double(), r1 + ties, w1, r_t + ties, w_t])


def _total(values: Tensor) -> Tensor:
    return values.sum(-1, dtype=torch.float64 if values.is_floating_point() else torch.int32)


def _maxima(logits: Tensor) -> Tensor:
    return logits.amax(-1).to(compute_dtype(logits)).clamp_min(LOWEST)


def _target_logits(logits: Tensor, local_targets: Tensor) -> Tensor:
    owned = (local_targets >= 0) & (local_targets < logits.size(-1))
    values = logits.gather(-1, local_targets.clamp(0, logits.size(-1) - 1)[:, None])[:, 0].double()
    return torch.where(owned, values, 0.0)


def _write_gradient(
    out: Tensor,
    logits: Tensor,
    local_targets: Tensor | None,
    scalars: RowScalars,
    coefficients: RowCoefficients,
    temperature: float,
) -> None:
    d = _shifted(logits, scalars.maximum)

    def column(values: Tensor) -> Tensor:
        return values[:, None].to(d.dtype)

    gradient = None
    if coefficients.contrast is not None:
        gap = scalars.tempered_log_sum - scalars.log_sum  # taken in float64
        log_ratio = torch.mul(d, 1.0 - 1.0 / temperature).add_(column(gap))
        gradient = _difference(d - column(scalars.log_sum), log_ratio).mul_(column(coefficients.contrast))
    if coefficients.target is not None:
        assert local_targets is not None
        log_p = torch.mul(d, 1.0 / temperature).sub_(column(scalars.tempered_log_sum))
        term = _logprob_gradient(log_p, local_targets).mul_(column(coefficients.target))
        gradient = term if gradient is None else gradient.add_(term)
    if coefficients.entropy is not None:
        term = (d - column(scalars.log_sum)).exp_()
        term.mul_(d.sub_(column(scalars.mean))).mul_(column(coefficients.entropy))
        gradient = term if gradient is None else gradient.add_(term)
    out.copy_(torch.zeros_like(d) if gradient is None else gradient)


def _logprob_gradient(log_p: Tensor, local_targets: Tensor) -> Tensor:
    """[N, C] 1[v = y] - p_v; at a nearly certain target 1 - p would cancel in float32."""
    owned = (local_targets >= 0) & (local_targets < log_p.size(-1))
    ids = local_targets.clamp(0, log_p.size(-1) - 1)[:, None]
    log_p_target = log_p.gather(-1, ids)
    at_target = _difference(torch.zeros_like(log_p_target), -log_p_target)
    gradient = log_p.exp_().neg_()
    return gradient.scatter_(-1, ids, torch.where(owned[:, None], at_target, gradient.gather(-1, ids)))


def _difference(log_q: Tensor, log_ratio: Tensor) -> Tensor:
    """q - p from log q, possibly in place, and log q - log p: to float32's digits, however near the two are."""
    if not torch.compiler.is_compiling():
        larger = log_q.sub_(log_ratio.clamp_max(0.0)).exp_()
        return log_ratio.abs().neg_().expm1_().mul_(larger).copysign_(log_ratio)
    # Inductor vectorizes expm1 as exp(x) - 1, the very subtraction that cancels; so p (e^x - 1) by its series
    q, p, x = log_q.exp(), (log_q - log_ratio).exp(), log_ratio
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040)))))))
    return torch.where(x.abs() < 0.5, series * p, q - p)


def _shifted(logits: Tensor, maximum: Tensor) -> Tensor:
    """[N, C] d = z - m, finite also where z is -inf; NaN stays NaN."""
    dtype = compute_dtype(logits)
    return (logits.to(dtype) - maximum[:, None].to(dtype)).clamp_min_(NO_PROBABILITY)


def compute_dtype(logits: Tensor) -> torch.dtype:
    """Of the arithmetic and of answers: float64 for float64 logits, float32 for all others."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Plan:
    """How a CPU, or a GPU without Triton, goes through the logits."""

    blocks: list[slice]
    sums: Callable[..., Tensor] = _sums
    gradient: Callable[..., None] = _write_gradient


def _plan(logits: Tensor) -> _Plan:
    compiled = _compiled() if compiles_here(logits) else None
    return _Plan(row_blocks(logits, compiled is not None), *(compiled or ()))


def compiles_here(logits: Tensor) -> bool:
    """Whether torch.compile works and is worth its time."""
    is_large = logits.size(-1) >= _COMPILE_FROM_COLUMNS and logits.numel() >= _COMPILE_FROM_ELEMENTS
    return is_large and not logits.is_cuda and logits.dtype != torch.float64 and _compiled() is not None


@cache
def _compiled() -> tuple[Callable[..., Tensor], Callable[..., None]] | None:
    """Sums and gradient through torch.compile, or None where that does not work (it needs a C++ compiler)."""
    sums, gradient = torch.compile(_sums_to_compile, dynamic=True), torch.compile(_write_gradient, dynamic=True)
    try:
        sums(torch.zeros(2, 64), 1.5)
    except Exception as error:
        logger.warning("the tempered KL runs uncompiled, about three times slower: %s", str(error).splitlines()[0])
        return None
    return sums, gradient


def row_blocks(logits: Tensor, compiled: bool) -> list[slice]:
    """The rows to work on at a time."""
    elements = _GPU_BLOCK if logits.is_cuda else _COMPILED_BLOCK if compiled else _CPU_BLOCK
    return chunks(logits.size(0), max(1, elements // logits.size(-1)))


def out_and_input(out: Tensor, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """`rows` of both, as one and the same tensor where `out` is `logits`: compiled code then knows that it overwrites what it
    reads, and needs no copy of it."""
    into = out[rows]
    return into, into if out.data_ptr() == logits.data_ptr() and out.dtype == logits.dtype else logits[rows]


def chunks(count: int, size: int) -> list[slice]:
    """0 to `count` cut into slices of `size`, the last of which may be shorter."""
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]
