"""The LM head's matrix products for a chunk of tokens: logits in float32, and gradients into what Megatron sums them up in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_reheat.parallel.vocab_kernels import chunks, compute_dtype

# Rows of the head's weight whose gradient, or float32 copy, exists at a time.
_WEIGHT_BLOCK = 8192


def weight_gradient(weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where the head's gradient is summed up, and what autograd is given of it."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is not None:
        return main_grad, None
    # float32 sums, as in Megatron's buffers: there is one term per chunk
    gradient = torch.zeros_like(weight, dtype=compute_dtype(weight))
    return gradient, gradient


def add_outer(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total [V/TP, H] += gradient^T hidden, without a temporary of the weight's size."""
    columns = gradient.size(-1)
    if total.dtype == gradient.dtype:
        total[:columns].addmm_(gradient.t(), hidden)
        return
    for block in chunks(columns, _WEIGHT_BLOCK):
        total[block].add_(gradient[:, block].t() @ hidden)


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """[n, H] x [C, H] -> [n, C] in float32 (or float64), whatever the inputs: low-precision logits distort entropies."""
    dtype = compute_dtype(hidden)
    if hidden.dtype == dtype:
        return hidden @ weight.t()
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=dtype)
    logits = hidden.new_empty(hidden.size(0), weight.size(0), dtype=dtype)
    for block in chunks(weight.size(0), _WEIGHT_BLOCK):
        logits[:, block] = hidden.to(dtype) @ weight[block].to(dtype).t()
    return logits


def head_gradient(
    hidden: Tensor,
    weight: Tensor,
    columns: int,
    write: Callable[[Tensor, slice], None],
    chunk_tokens: int,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of hidden states [N, H] and, if wanted, of the weight, what autograd is given of it.

    `write` replaces the logits [n, columns] of some rows, made again from the first `columns` rows of the weight, by their
    gradient.
    """
    valid = weight[:columns]
    grad_hidden = torch.zeros_like(hidden)
    grad_weight, returned = weight_gradient(weight) if wanted else (None, None)

    def take(rows: slice) -> None:  # a function, so that a chunk's logits are gone before the next ones are made
        logits = head_logits(hidden[rows], valid)
        write(logits, rows)
        gradient = logits.to(weight.dtype)
        torch.mm(gradient, valid, out=grad_hidden[rows])
        if grad_weight is not None:
            add_outer(grad_weight, gradient, hidden[rows])

    for rows in chunks(hidden.size(0), chunk_tokens):
        take(rows)
    return grad_hidden, None if returned is None else returned.to(weight.dtype)
