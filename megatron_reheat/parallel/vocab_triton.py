"""The two vocabulary kernels in Triton: one read of the logits forward, one read and one write backward.

float32 arithmetic on bfloat16, float16 or float32 logits, any number of columns, rows any distance apart, 64-bit addresses.
Triton's interpreter runs the same code on CPU tensors (TRITON_INTERPRET=1), which is how the tests check its arithmetic.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from megatron_reheat.parallel.vocab_rows import RowCoefficients, RowScalars

try:
    import triton
    import triton.language as tl
except ImportError:  # comes with every CUDA build of torch; elsewhere the plain backend serves
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(logits: Tensor) -> bool:
    """Whether these logits go through Triton: on CUDA, or on any device under Triton's interpreter."""
    on_device = logits.is_cuda or INTERPRETED
    return triton is not None and on_device and logits.dtype in DTYPES and logits.stride(-1) == 1


def shard_sums(out: Tensor, logits: Tensor, local_targets: Tensor | None, temperature: float) -> None:
    """Fills `out` [6, N] float64; see `vocab_kernels.shard_sums`."""
    num_rows, columns = logits.shape
    _shard_sums_kernel[(num_rows,)](
        logits,
        logits.stride(0),
        out if local_targets is None else local_targets,
        out,
        out.stride(0),
        columns,
        1.0 / temperature,
        HAS_TARGETS=local_targets is not None,
        TEMPERED=temperature != 1,
    )


def write_gradient(
    out: Tensor,
    logits: Tensor,
    local_targets: Tensor | None,
    scalars: RowScalars,
    coefficients: RowCoefficients,
    temperature: float,
) -> None:
    """Writes the gradient [N, C] into `out`, possibly the logits themselves; see `vocab_kernels.write_gradient`."""
    num_rows, columns = logits.shape
    absent = torch.zeros(num_rows, device=logits.device)
    c_target, c_entropy, c_contrast = (
        absent if c is None else c.float() for c in (coefficients.target, coefficients.entropy, coefficients.contrast)
    )
    gap = scalars.tempered_log_sum - scalars.log_sum  # taken before rounding to float32
    rows = torch.stack(
        [
            x.float()
            for x in (
                scalars.maximum, scalars.log_sum, scalars.mean, scalars.tempered_log_sum, gap,
                c_target, c_entropy, c_contrast,
            )
        ]
    )  # fmt: skip
    if out.stride(-1) != 1:
        raise ValueError("the gradient's columns must lie side by side")

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return num_rows, triton.cdiv(columns, meta["BLOCK"])

    _gradient_kernel[grid](
        logits,
        logits.stride(0),
        absent if local_targets is None else local_targets,
        rows,
        rows.stride(0),
        out,
        out.stride(0),
        columns,
        1.0 / temperature,
        1.0 - 1.0 / temperature,
        HAS_TARGET=coefficients.target is not None,
        HAS_ENTROPY=coefficients.entropy is not None,
        HAS_CONTRAST=coefficients.contrast is not None,
    )


if triton is not None:
    # defined here, as constants of the kernels' module: Triton reads globals only when they are constexpr
    _LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
    _NO_PROBABILITY = tl.constexpr(-1e30)

    def autotune(configs: list[tuple[int, int]], restore: list[str]) -> Any:
        """Tries (block, warps) pairs once per vocabulary size and dtype; the interpreter has nothing to time."""
        choices = [triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in configs]
        if INTERPRETED:
            choices = choices[:1]
        # the tuner runs a kernel many times, and `out` may be the logits
        return triton.autotune(choices, key=["columns"], restore_value=restore)

    @autotune([(4096, 8), (4096, 16), (2048, 4), (2048, 8), (8192, 16)], restore=[])
    @triton.jit
    def _shard_sums_kernel(
        logits,
        logits_stride,
        targets,
        out,
        out_stride,
        columns,
        inverse_temperature,
        HAS_TARGETS: tl.constexpr,
        TEMPERED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program a row. Every lane keeps its own sums, relative to the row's running maximum.

        Columns at the maximum are counted apart: a lane's float32 sum of 1 and 1e-8 is 1.
        """
        row = tl.program_id(0).to(tl.int64)
        start = logits + row * logits_stride
        lanes = tl.arange(0, BLOCK)
        maximum = tl.full((), _LOWEST, tl.float32)
        ones = tl.zeros((BLOCK,), tl.float32)
        r1 = tl.zeros((BLOCK,), tl.float32)
        w1 = tl.zeros((BLOCK,), tl.float32)
        r_t = tl.zeros((BLOCK,), tl.float32)
        w_t = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, columns, BLOCK):
            inside = first + lanes < columns
            z = tl.load(start + first + lanes, mask=inside, other=-float("inf")).to(tl.float32)
            higher = tl.maximum(maximum, tl.max(z, axis=0))
            down = maximum - higher
            scale = tl.exp(down)
            maximum = higher
            d = z - maximum
            # a comparison that is false for NaN, which therefore stays
            d = tl.where(d < _NO_PROBABILITY, _NO_PROBABILITY, d)
            is_maximum = d == 0
            surpassed = tl.where(down < 0, ones, 0.0)
            ones += tl.where(is_maximum, 1.0, 0.0) - surpassed
            r1 += surpassed
            e = tl.exp(d)
            w1 = (w1 + r1 * down) * scale + e * d
            r1 = r1 * scale + tl.where(is_maximum, 0.0, e)
            if TEMPERED:
                tempered_scale = tl.exp(down * inverse_temperature)
                t = tl.exp(d * inverse_temperature)
                r_t += surpassed
                w_t = (w_t + r_t * down) * tempered_scale + t * d
                r_t = r_t * tempered_scale + tl.where(is_maximum, 0.0, t)
        if not TEMPERED:
            r_t = r1
            w_t = w1
        ties = tl.sum(ones.to(tl.float64), axis=0) - 1
        out += row
        tl.store(out, maximum.to(tl.float64))
        tl.store(out + out_stride, tl.sum(r1.to(tl.float64), axis=0) + ties)
        tl.store(out + 2 * out_stride, tl.sum(w1.to(tl.float64), axis=0))
        tl.store(out + 3 * out_stride, tl.sum(r_t.to(tl.float64), axis=0) + ties)
        tl.store(out + 4 * out_stride, tl.sum(w_t.to(tl.float64), axis=0))
        if HAS_TARGETS:
            target = tl.load(targets + row)
            owned = (target >= 0) & (target < columns)
            value = tl.load(start + target, mask=owned, other=0.0)
            tl.store(out + 5 * out_stride, value.to(tl.float32).to(tl.float64))

    @triton.jit
    def _expm1_of_negative(x):
        """e^x - 1 for x <= 0 in float32: a Taylor polynomial where the subtraction would cancel."""
        near = x * (1 + x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040)))))))
        return tl.where(x > -0.5, near, tl.exp(x) - 1)

    @autotune([(2048, 4), (1024, 4), (4096, 8), (8192, 8)], restore=["out"])
    @triton.jit
    def _gradient_kernel(
        logits,
        logits_stride,
        targets,
        rows,
        rows_stride,
        out,
        out_stride,
        columns,
        inverse_temperature,
        flattening,
        HAS_TARGET: tl.constexpr,
        HAS_ENTROPY: tl.constexpr,
        HAS_CONTRAST: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program a block of a row; reads its logits before it writes, so `out` may be `logits`."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        z = tl.load(logits + row * logits_stride + column, mask=inside, other=0.0).to(tl.float32)
        rows += row
        maximum = tl.load(rows)
        log_sum = tl.load(rows + rows_stride)
        tempered_log_sum = tl.load(rows + 3 * rows_stride)
        d = z - maximum
        d = tl.where(d < _NO_PROBABILITY, _NO_PROBABILITY, d)
        log_q = d - log_sum
        log_p = d * inverse_temperature - tempered_log_sum
        gradient = tl.zeros((BLOCK,), tl.float32)
        if HAS_CONTRAST:
            gap = tl.load(rows + 4 * rows_stride)
            log_ratio = d * flattening + gap
            larger = tl.exp(log_q - tl.minimum(log_ratio, 0.0))
            magnitude = -larger * _expm1_of_negative(-tl.abs(log_ratio))
            gradient += tl.load(rows + 7 * rows_stride) * tl.where(log_ratio < 0, -magnitude, magnitude)
        if HAS_TARGET:
            target = tl.load(targets + row)
            p = tl.where(column == target, _expm1_of_negative(tl.minimum(log_p, 0.0)), tl.exp(log_p))
            gradient -= tl.load(rows + 5 * rows_stride) * p
        if HAS_ENTROPY:
            mean = tl.load(rows + 2 * rows_stride)
            gradient += tl.load(rows + 6 * rows_stride) * tl.exp(log_q) * (d - mean)
        tl.store(out + row * out_stride + column, gradient.to(out.dtype.element_ty), mask=inside)
