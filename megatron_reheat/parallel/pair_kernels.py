"""Per-token sums over two distributions on a vocabulary shard, and the gradient they imply; backends as for `vocab_kernels`.

With p = softmax(z/T) the policy's, q = softmax(u/T) the other one's, both normalized over all shards, x = log p - log q,
S(x) = e^x - 1 - x, t = x/2, g = 1/2 log(2p / (p + q)), and x* and g* their values at the policy's top token:

    pair_sums   reverse  sum p S(-x),                          sum p (x - x*)
                forward  sum q S(x),                           -sum q x
                js       sum (p + q)/2 (t tanh t - ln cosh t), sum p (g - g*)
    gradient    reverse  p (x - x* - sum);  forward  p - q;  js  p (g - g* - sum);  each times a factor per row

The first sums are the divergences: sum p S(-x) is KL(p || q), as both p and q add up to 1, and Jensen-Shannon's form is its
definition. No term is negative, and what float32 leaves of the normalizers moves them in second order only; so two nearly
equal distributions keep their digits if x does: it is taken from z - u with the rounding error of that subtraction, and
functions of it near zero from their series. The gradient of a policy that is nearly certain keeps its digits because its top
token, which decides the sums, is where x - x* is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from megatron_reheat.parallel import pair_triton
from megatron_reheat.parallel.vocab_kernels import (
    NO_PROBABILITY,
    compiles_here,
    compute_dtype,
    out_and_input,
    row_blocks,
)
from megatron_reheat.parallel.vocab_rows import PairConstants, PairScalars

Measure = Literal["forward", "reverse", "js"]


def pair_sums(logits: Tensor, others: Tensor, scalars: PairScalars, measure: Measure, temperature: float) -> Tensor:
    """[N, C] logits of the policy and of the other -> [2, N] float64, to be added up over the shards."""
    if measure == "forward":  # the same sums with the roles exchanged
        logits, others, scalars = others, logits, scalars.swapped()
    sums = torch.zeros(2, logits.size(0), dtype=torch.float64, device=logits.device)
    if logits.numel() == 0:
        return sums
    logits, others = logits.detach(), others.detach()
    constants = _constants(scalars, temperature, compute_dtype(logits), from_top=measure != "forward")
    if pair_triton.supports(logits, others):
        pair_triton.pair_sums(sums, logits, others, constants, is_js=measure == "js")
        return sums
    blocks, take = _plan(logits, _js_sums if measure == "js" else _kl_sums)
    for rows in blocks:
        sums[:, rows] = take(logits[rows], others[rows], constants[:, rows].clone())
    return sums


def write_pair_gradient(
    out: Tensor,
    logits: Tensor,
    others: Tensor,
    scalars: PairScalars,
    factor: Tensor,
    measure: Measure,
    temperature: float,
) -> None:
    """Writes the gradient [N, C] times `factor` [N] into `out`, which may be `logits` itself."""
    if logits.numel() == 0:
        return
    logits, others = logits.detach(), others.detach()
    constants = _constants(scalars, temperature, compute_dtype(logits), factor)
    if pair_triton.supports(logits, others):
        pair_triton.write_gradient(out, logits, others, constants, measure)
        return
    blocks, gradient = _plan(logits, _GRADIENTS[measure])
    for rows in blocks:
        gradient(*out_and_input(out, logits, rows), others[rows], constants[:, rows].clone())


def _constants(
    s: PairScalars, temperature: float, dtype: torch.dtype, factor: Tensor | None = None, *, from_top: bool = True
) -> Tensor:
    """[15, N], the order of `PairConstants`; unless `from_top`, x itself takes the place of x - x*."""
    absent = torch.zeros_like(s.maximum)
    shift, gap = s.maximum - s.other_maximum, s.log_sum - s.other_log_sum
    at_top = s.other_at_top.clamp_min(NO_PROBABILITY)
    x_top = (s.other_maximum - at_top) / temperature - gap
    top, top_gap = (s.maximum - at_top, absent) if from_top else (shift, gap)
    values = PairConstants(
        inverse_temperature=torch.full_like(s.maximum, 1 / temperature),
        maximum=s.maximum,
        log_sum=s.log_sum,
        other_maximum=s.other_maximum,
        other_log_sum=s.other_log_sum,
        shift=shift,
        shift_error=shift - shift.to(dtype),
        gap=gap,
        top=top,
        top_error=top - top.to(dtype),
        top_gap=top_gap,
        top_other_share=(-x_top).sigmoid(),
        top_log_share=torch.nn.functional.logsigmoid(x_top),
        center=s.center,
        factor=absent if factor is None else factor,
    )
    return torch.stack([value.to(dtype) for value in values])


class _Pair(NamedTuple):
    """[N, C], finite also where a logit is -inf."""

    p: Tensor
    q: Tensor
    x: Tensor
    x_from_top: Tensor  # x - x*


def _pair(logits: Tensor, others: Tensor, c: PairConstants) -> _Pair:
    z, u = (w.to(c.maximum.dtype).clamp_min(NO_PROBABILITY) for w in (logits, others))
    difference = z - u
    back = difference - z
    error = (z - (difference - back)) - (u + back)  # exactly what the subtraction lost (Knuth's two-sum)
    return _Pair(
        p=((z - c.maximum) * c.inverse_temperature - c.log_sum).exp(),
        q=((u - c.other_maximum) * c.inverse_temperature - c.other_log_sum).exp(),
        x=((difference - c.shift) + (error - c.shift_error)) * c.inverse_temperature - c.gap,
        x_from_top=((difference - c.top) + (error - c.top_error)) * c.inverse_temperature - c.top_gap,
    )


def _columns(constants: Tensor) -> PairConstants:
    return PairConstants(*constants[:, :, None].unbind(0))


def _kl_sums(logits: Tensor, others: Tensor, constants: Tensor) -> Tensor:
    pair = _pair(logits, others, _columns(constants))
    p, q, x = pair.p, pair.q, pair.x
    values = torch.where(x.abs() < _near(x), p * _remainder(-x), p * x + (q - p))
    # infinite where q excludes what p allows
    excluded = (others <= NO_PROBABILITY) & (p > 0)
    both = (v.masked_fill(excluded, math.inf) for v in (values, p * pair.x_from_top))
    return torch.stack([v.sum(-1, dtype=torch.float64) for v in both])


def _js_sums(logits: Tensor, others: Tensor, constants: Tensor) -> Tensor:
    c = _columns(constants)
    pair = _pair(logits, others, c)
    both = 0.5 * (pair.p + pair.q) * _js_share(pair.x), pair.p * _js_slope(pair, c)
    return torch.stack([v.sum(-1, dtype=torch.float64) for v in both])


def _forward_gradient(out: Tensor, logits: Tensor, others: Tensor, constants: Tensor) -> None:
    c = _columns(constants)
    p, q, x, _ = _pair(logits, others, c)
    out.copy_(c.factor * torch.where(x.abs() < _near(x), q * (x + _remainder(x)), p - q))


def _reverse_gradient(out: Tensor, logits: Tensor, others: Tensor, constants: Tensor) -> None:
    c = _columns(constants)
    pair = _pair(logits, others, c)
    out.copy_(c.factor * (pair.p * (pair.x_from_top - c.center)))


def _js_gradient(out: Tensor, logits: Tensor, others: Tensor, constants: Tensor) -> None:
    c = _columns(constants)
    pair = _pair(logits, others, c)
    out.copy_(c.factor * (pair.p * (_js_slope(pair, c) - c.center)))


_GRADIENTS: dict[Measure, Callable[..., None]] = {
    "forward": _forward_gradient,
    "reverse": _reverse_gradient,
    "js": _js_gradient,
}


def _near(x: Tensor) -> float:
    """Below it the series are exact to the dtype's digits."""
    return 0.5 if x.dtype == torch.float32 else 1 / 16


def _remainder(x: Tensor) -> Tensor:
    """e^x - 1 - x near zero."""
    series = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320))))
    return x * x * (1 / 2 + x * (1 / 6 + x * series))


def _log1p(x: Tensor) -> Tensor:
    """Of -0.4 < x <= 1: the series of 2 artanh(x / (2 + x)), a third of the time of the library's."""
    if x.dtype == torch.float64:
        return x.log1p()
    s = x / (2 + x)
    q = s * s
    series = 1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15))))
    return 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * series)))


def _js_share(x: Tensor) -> Tensor:
    """t tanh t - ln cosh t with t = x/2; at most ln 2."""
    square = (x * x) / 4
    series = 1 / 2 - square * (1 / 4 - square * (1 / 9 - square * (17 / 360 - square * (31 / 1575))))
    negative = -x.abs()
    ratio = negative.exp()
    far = math.log(2) - _log1p(ratio) + negative * ratio / (1 + ratio)
    return torch.where(negative > -_near(x), square * series, far)


def _js_slope(pair: _Pair, c: PairConstants) -> Tensor:
    """g - g*"""
    x, r = pair.x, pair.x_from_top
    near = -_log1p(c.top_other_share * (_remainder(-r) - r))
    far = (x.clamp_max(0) - _log1p(x.abs().neg().exp())) - c.top_log_share
    return torch.where(r.abs() < _near(r), near, far) / 2


def _plan(logits: Tensor, function: Callable[..., Any]) -> tuple[list[slice], Callable[..., Any]]:
    compiled = compiles_here(logits)
    return row_blocks(logits, compiled), _compiled(function) if compiled else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
