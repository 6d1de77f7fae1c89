"""The kernels of `pair_kernels` in Triton: one read of both logits for the sums, one read and one write for the gradient.

As in `vocab_triton`: float32 arithmetic, any number of columns, rows any distance apart, and Triton's interpreter on a CPU.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from megatron_reheat.parallel import vocab_triton
from megatron_reheat.parallel.vocab_triton import triton

if triton is not None:
    import triton.language as tl


def supports(logits: Tensor, others: Tensor) -> bool:
    """Whether Triton takes both; they need not have the same dtype."""
    return vocab_triton.supports(logits) and vocab_triton.supports(others)


def pair_sums(out: Tensor, logits: Tensor, others: Tensor, constants: Tensor, *, is_js: bool) -> None:
    """Fills `out` [2, N] float64; `constants` [15, N] float32 are `PairConstants`."""
    num_rows, columns = logits.shape
    strides = logits.stride(0), others.stride(0), constants.stride(0), out.stride(0)
    _pair_sums_kernel[(num_rows,)](logits, others, constants, out, *strides, columns, IS_JS=is_js)


def write_gradient(out: Tensor, logits: Tensor, others: Tensor, constants: Tensor, measure: str) -> None:
    """Writes the gradient [N, C] into `out`, possibly the logits themselves."""
    num_rows, columns = logits.shape
    if out.stride(-1) != 1:
        raise ValueError("the gradient's columns must lie side by side")

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return num_rows, triton.cdiv(columns, meta["BLOCK"])

    strides = logits.stride(0), others.stride(0), constants.stride(0), out.stride(0)
    _pair_gradient_kernel[grid](
        logits, others, constants, out, *strides, columns, IS_FORWARD=measure == "forward", IS_JS=measure == "js"
    )


if triton is not None:
    _NO_PROBABILITY = tl.constexpr(-1e30)
    _LN_2 = tl.constexpr(math.log(2))

    @triton.jit
    def _pair(z, u, rows, stride):
        """p, q, x and x - x*; the row's constants stand in the order of `PairConstants`."""
        inverse_temperature = tl.load(rows)
        z = tl.where(z < _NO_PROBABILITY, _NO_PROBABILITY, z)  # false for NaN, which therefore stays
        u = tl.where(u < _NO_PROBABILITY, _NO_PROBABILITY, u)
        difference = z - u
        back = difference - z
        error = (z - (difference - back)) - (u + back)
        p = tl.exp((z - tl.load(rows + stride)) * inverse_temperature - tl.load(rows + 2 * stride))
        q = tl.exp((u - tl.load(rows + 3 * stride)) * inverse_temperature - tl.load(rows + 4 * stride))
        from_shift = (difference - tl.load(rows + 5 * stride)) + (error - tl.load(rows + 6 * stride))
        from_top = (difference - tl.load(rows + 8 * stride)) + (error - tl.load(rows + 9 * stride))
        x = from_shift * inverse_temperature - tl.load(rows + 7 * stride)
        x_from_top = from_top * inverse_temperature - tl.load(rows + 10 * stride)
        return p, q, x, x_from_top

    @triton.jit
    def _remainder(x):
        """e^x - 1 - x near zero."""
        series = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320))))
        return x * x * (0.5 + x * (1 / 6 + x * series))

    @triton.jit
    def _log1p(x):
        """Of -0.4 < x <= 1."""
        s = x / (2 + x)
        q = s * s
        series = 1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15))))
        return 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * series)))

    @triton.jit
    def _js_share(x):
        square = x * x / 4
        near = square * (0.5 - square * (0.25 - square * (1 / 9 - square * (17 / 360 - square * (31 / 1575)))))
        negative = -tl.abs(x)
        ratio = tl.exp(negative)
        far = _LN_2 - _log1p(ratio) + negative * ratio / (1 + ratio)
        return tl.where(negative > -0.5, near, far)

    @triton.jit
    def _js_slope(x, r, top_other_share, top_log_share):
        # of a near r only, where the polynomial does not overflow
        near = -_log1p(top_other_share * tl.where(tl.abs(r) < 0.5, _remainder(-r) - r, 0.0))
        far = tl.minimum(x, 0.0) - _log1p(tl.exp(-tl.abs(x))) - top_log_share
        return tl.where(tl.abs(r) < 0.5, near, far) / 2

    @vocab_triton.autotune([(4096, 8), (4096, 16), (2048, 4), (2048, 8)], restore=[])
    @triton.jit
    def _pair_sums_kernel(
        logits,
        others,
        rows,
        out,
        logits_stride,
        others_stride,
        rows_stride,
        out_stride,
        columns,
        IS_JS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program a row; every lane keeps its own sums."""
        row = tl.program_id(0).to(tl.int64)
        lanes = tl.arange(0, BLOCK)
        rows += row
        top_other_share = tl.load(rows + 11 * rows_stride)
        top_log_share = tl.load(rows + 12 * rows_stride)
        values = tl.zeros((BLOCK,), tl.float32)
        products = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, columns, BLOCK):
            column = first + lanes
            inside = column < columns
            z = tl.load(logits + row * logits_stride + column, mask=inside, other=-float("inf")).to(tl.float32)
            u = tl.load(others + row * others_stride + column, mask=inside, other=-float("inf")).to(tl.float32)
            p, q, x, x_from_top = _pair(z, u, rows, rows_stride)
            if IS_JS:
                values += 0.5 * (p + q) * _js_share(x)
                products += p * _js_slope(x, x_from_top, top_other_share, top_log_share)
            else:
                share = tl.where(tl.abs(x) < 0.5, p * _remainder(-x), p * x + (q - p))
                excluded = (u <= _NO_PROBABILITY) & (p > 0)
                values += tl.where(excluded, float("inf"), share)
                products += tl.where(excluded, float("inf"), p * x_from_top)
        out += row
        tl.store(out, tl.sum(values.to(tl.float64), axis=0))
        tl.store(out + out_stride, tl.sum(products.to(tl.float64), axis=0))

    @vocab_triton.autotune([(2048, 4), (1024, 4), (4096, 8)], restore=["out"])
    @triton.jit
    def _pair_gradient_kernel(
        logits,
        others,
        rows,
        out,
        logits_stride,
        others_stride,
        rows_stride,
        out_stride,
        columns,
        IS_FORWARD: tl.constexpr,
        IS_JS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program a block of a row; reads before it writes, so `out` may be `logits`, `others` or both."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        rows += row
        z = tl.load(logits + row * logits_stride + column, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(others + row * others_stride + column, mask=inside, other=0.0).to(tl.float32)
        p, q, x, x_from_top = _pair(z, u, rows, rows_stride)
        center = tl.load(rows + 13 * rows_stride)
        if IS_FORWARD:
            gradient = tl.where(tl.abs(x) < 0.5, q * (x + _remainder(x)), p - q)
        elif IS_JS:
            top_other_share = tl.load(rows + 11 * rows_stride)
            top_log_share = tl.load(rows + 12 * rows_stride)
            gradient = p * (_js_slope(x, x_from_top, top_other_share, top_log_share) - center)
        else:
            gradient = p * (x_from_top - center)
        gradient *= tl.load(rows + 14 * rows_stride)
        tl.store(out + row * out_stride + column, gradient.to(out.dtype.element_ty), mask=inside)
