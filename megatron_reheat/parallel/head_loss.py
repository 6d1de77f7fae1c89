"""`head_loss`: the LM head and a loss that is a sum over tokens, forward and backward a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_reheat.parallel.head_products import add_outer, head_logits, weight_gradient
from megatron_reheat.parallel.vocab import DEFAULT_CHUNK_TOKENS, VocabLogits
from megatron_reheat.parallel.vocab_kernels import chunks, compute_dtype

ChunkLoss = Callable[[Sequence[VocabLogits], slice], Tensor]
NO_WEIGHTS: Mapping[int, Tensor] = {}


def head_loss(
    hiddens: Sequence[Tensor],
    weight: Tensor,
    loss: ChunkLoss,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    *,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    other_weights: Mapping[int, Tensor] = NO_WEIGHTS,
) -> Tensor:
    """A loss that is a sum over tokens, from hidden states and the head's weight: forward and backward chunk by chunk.

    `loss` sees the logits of one chunk, one `VocabLogits` for each of `hiddens`, and which rows they belong to; it returns
    its share. Its gradient is taken while the chunk's logits still exist, so that the head costs three matrix products, not
    the four of `VocabHead`, whose backward pass makes the logits again; one for hidden states that need no gradient.

    Args:
        hiddens: one or more [N, H], otherwise as for `VocabHead`: the policy's, then what its predictions are compared with,
            row by row: other layers, which may require gradient, or the same tokens behind another prompt, which need none.
        weight: [V/TP, H]. Where it has Megatron's `main_grad`, the gradient is added there at once; the result must then
            enter the total loss with factor one, which the backward pass checks.
        chunk_tokens: rows whose logits exist at a time, for every one of `hiddens`.
        other_weights: by position in `hiddens`, the head of another model that predicts from these, which need no gradient.

    Returns:
        The sum of the shares, a scalar that carries gradient to `weight`, to the first of `hiddens` and to those of the
        others that require it.
    """
    if any(h.shape != hiddens[0].shape for h in hiddens):
        raise ValueError(f"hidden states have different shapes: {[tuple(h.shape) for h in hiddens]}")
    if any(hiddens[i].requires_grad for i in other_weights):
        raise ValueError("another head has no gradient, so hidden states that it predicts from must not require one")
    total: Tensor = _HeadLoss.apply(weight, loss, vocab_size, group, chunk_tokens, other_weights, *hiddens)
    return total


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        loss: ChunkLoss,
        vocab_size: int,
        group: dist.ProcessGroup | None,
        chunk_tokens: int,
        other_weights: Mapping[int, Tensor],
        *hiddens: Tensor,
    ) -> Tensor:
        trained = [i for i, h in enumerate(hiddens) if i == 0 or h.requires_grad]
        grads = {i: torch.empty_like(hiddens[i]) for i in trained}
        grad_weight, returned = weight_gradient(weight)
        total = torch.zeros((), dtype=compute_dtype(weight), device=weight.device)

        def take(rows: slice) -> None:  # a function, so that a chunk's logits are gone before the next ones are made
            logits = [
                head_logits(h[rows], other_weights.get(i, weight)).requires_grad_(i in grads)
                for i, h in enumerate(hiddens)
            ]
            with torch.enable_grad():
                value = loss([VocabLogits(z, vocab_size, group, overwrite=True) for z in logits], rows)
            asked = [logits[i] for i in trained]
            gradients: Sequence[Tensor | None] = torch.autograd.grad(value, asked, allow_unused=True)
            for i, gradient in zip(trained, gradients, strict=True):
                if gradient is None:  # the loss did not look at these
                    grads[i][rows] = 0.0
                    continue
                gradient = gradient.to(weight.dtype)
                torch.mm(gradient, weight, out=grads[i][rows])
                add_outer(grad_weight, gradient, hiddens[i][rows])
            total.add_(value.detach())

        for rows in chunks(hiddens[0].size(0), chunk_tokens):
            take(rows)
        ctx.save_for_backward(
            None if returned is None else returned.to(weight.dtype), *(grads.get(i) for i in range(len(hiddens)))
        )
        return total

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:
        grad_weight, *grads = ctx.saved_tensors
        if grad_weight is None:
            torch._assert_async(factor == 1, "a loss whose head gradient is in main_grad must not be scaled")
            return None, None, None, None, None, None, *grads
        return grad_weight * factor, None, None, None, None, None, *(None if g is None else g * factor for g in grads)
