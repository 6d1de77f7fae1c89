"""Linear CKA: how alike two representations of the same tokens are (Kornblith et al. 2019, arXiv 1905.00414)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_reheat.parallel.vocab_kernels import chunks

CHUNK_TOKENS = 512


@torch.no_grad()
def linear_cka(x: Tensor, y: Tensor, chunk_tokens: int = CHUNK_TOKENS) -> float | None:
    """||Yc^T Xc||_F^2 / (||Xc^T Xc||_F ||Yc^T Yc||_F), with Xc and Yc less their means over tokens.

    It is 1 where one is the other but for a rotation, a reflection, a common factor and a shift. The sums over tokens are kept
    in float64, [H, H'] each; no matrix of tokens by tokens is made.

    Args:
        x: [n, H] any floating dtype, and y: [n, H'] of the same tokens.

    Returns:
        A number in [0, 1] but for rounding; None where one of them is the same for all tokens.
    """
    mean_x, mean_y = (states.mean(0, dtype=torch.float64) for states in (x, y))
    sums = [mean_x.new_zeros(len(left), len(right)) for left, right in _pairs(mean_x, mean_y)]
    for rows in chunks(len(x), chunk_tokens):
        centred = _pairs(x[rows].double() - mean_x, y[rows].double() - mean_y)
        for total, (left, right) in zip(sums, centred, strict=True):
            total.addmm_(left.t(), right)
    cross, own_x, own_y = (float(total.norm()) for total in sums)
    return cross**2 / (own_x * own_y) if own_x and own_y else None


def _pairs(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(x, y), (x, x), (y, y)]
