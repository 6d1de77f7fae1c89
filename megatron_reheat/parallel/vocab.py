"""Vocabulary-parallel log-probabilities, entropy and tempered KL: exact, closed form, one collective forward, none backward.

Tensor parallelism splits the vocabulary: each rank holds logits `[N, V/TP]`, or what makes them. Everything the losses need
follows from a few sums per token (`vocab_kernels`), taken on each shard relative to the shard's own maximum and merged like
an online softmax. With z the logits, m their global maximum and d = z - m:

    log q(y)      = d_y - A1                    q   = softmax(z), the policy
    log p_T(y)    = d_y/T - AT                  p_T = softmax(z/T), the teacher of TS-OPSD (arXiv 2606.00755)
    H(q)          = A1 - M1                     H(p_T) = AT - MT/T
    KL(p_T || q)  = (1/T - 1) MT - AT + A1      d/dz_v = q_v - p_T,v             teacher detached
    KL(q || p_T)  = (1 - 1/T) M1 - A1 + AT      d/dz_v = (1 - 1/T) q_v (d_v - M1)

The backward pass needs only the merged scalars, so no tensor of the logits' size outlives the forward pass except the logits
themselves (`VocabLogits`), or none at all: `VocabHead` makes them again chunk by chunk, and `head_loss`, for a loss that is a
sum over tokens, is done with a chunk before it makes the next. Scalars are kept in float64: entropies of 1e-4 nats and their
gradients stay exact to float32 rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_reheat.parallel.vocab_kernels import (
    NUM_SUMS,
    compute_dtype,
    merge,
    shard_sums,
    write_gradient,
)
from megatron_reheat.parallel.vocab_rows import RowCoefficients, RowScalars

Direction = Literal["forward", "reverse"]

DEFAULT_CHUNK_TOKENS = 1024

# Rows of the head's weight whose gradient, or float32 copy, exists at a time.
_WEIGHT_BLOCK = 8192


class TemperedKL(NamedTuple):
    """Per token, float32. Only `kl` carries gradient; `logprobs` (at temperature 1) is present when targets were given."""

    kl: Tensor
    entropy: Tensor
    teacher_entropy: Tensor
    logprobs: Tensor | None


class VocabLogprobs(NamedTuple):
    """Per token, float32. `logprobs` at the asked temperature, `entropy` at temperature 1; both carry gradient."""

    logprobs: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class Question:
    """What is asked of the logits: log-probabilities at `temperature`, or the KL to the policy tempered by it."""

    what: Literal["logprobs", "forward", "reverse"]
    temperature: float

    def answers(self, s: RowScalars, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """(logprobs, entropy), or (kl, entropy, teacher entropy, logprobs at temperature 1); each [N]."""
        entropy = (s.log_sum - s.mean).to(dtype)
        if self.what == "logprobs":
            return (s.target / self.temperature - s.tempered_log_sum).to(dtype), entropy
        gap, flattening = s.tempered_log_sum - s.log_sum, 1.0 - 1.0 / self.temperature
        kl = -flattening * s.tempered_mean - gap if self.what == "forward" else flattening * s.mean + gap
        teacher_entropy = (s.tempered_log_sum - s.tempered_mean / self.temperature).to(dtype)
        # rounding may leave a KL of exactly zero a hair below it
        return kl.clamp_min(0.0).to(dtype), entropy, teacher_entropy, (s.target - s.log_sum).to(dtype)

    def coefficients(self, gradients: tuple[Tensor | None, ...]) -> RowCoefficients:
        """Of the gradient, given those of the answers; only the first of a KL's carries any."""
        first, second = gradients[:2]
        if self.what == "logprobs":
            return RowCoefficients(
                target=None if first is None else first / self.temperature,
                entropy=None if second is None else -second,
            )
        if first is None:
            return RowCoefficients()
        if self.what == "forward":
            return RowCoefficients(contrast=first)
        return RowCoefficients(entropy=first * (1.0 - 1.0 / self.temperature))

    def mark(self, ctx: Any, answers: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)  # an answer nobody uses costs nothing in backward
        if self.what != "logprobs":
            ctx.mark_non_differentiable(*answers[1:])


class Vocabulary(ABC):
    """The model's prediction at every position, as the losses see it: what can be asked, not how it is stored."""

    vocab_size: int  # V without padding; columns from it on (Megatron pads V to a multiple of TP) take no probability
    group: dist.ProcessGroup | None

    def logprobs(self, targets: Tensor, *, temperature: float = 1.0) -> VocabLogprobs:
        """Log-probabilities of `targets` [...] (global token ids) at `temperature`, and the entropy at temperature 1."""
        return VocabLogprobs(*self._ask(Question("logprobs", temperature), targets))

    def tempered_kl(self, *, temperature: float, direction: Direction, targets: Tensor | None = None) -> TemperedKL:
        """KL between the policy and its own detached, flattened self. See `losses.tempered_kl`."""
        if direction not in ("forward", "reverse"):
            raise ValueError(f"direction must be 'forward' or 'reverse', not {direction!r}")
        kl, entropy, teacher_entropy, logprobs = self._ask(Question(direction, temperature), targets)
        return TemperedKL(kl, entropy, teacher_entropy, None if targets is None else logprobs)

    @abstractmethod
    def _ask(self, question: Question, targets: Tensor | None) -> tuple[Tensor, ...]:
        """The question's answers, one value per position."""

    @property
    @abstractmethod
    def num_columns(self) -> int:
        """This shard's columns, padding included."""

    @property
    def first_column(self) -> int:
        return self.num_columns * (0 if self.group is None else dist.get_rank(self.group))

    @property
    def num_valid_columns(self) -> int:
        """How many of this shard's columns are real vocabulary; the rest is padding, which may fill a whole shard."""
        return min(max(self.vocab_size - self.first_column, 0), self.num_columns)

    def _local(self, targets: Tensor | None, shape: torch.Size) -> Tensor | None:
        """[N] the targets' columns on this shard; outside it for those that other shards own."""
        if targets is None:
            return None
        if targets.shape != shape:
            raise ValueError(f"targets have shape {tuple(targets.shape)}, the predictions {tuple(shape)}")
        return targets.reshape(-1) - self.first_column


class VocabLogits(Vocabulary):
    """Logits that exist.

    Args:
        logits: [..., V/TP], any floating dtype; this rank's shard.
        vocab_size: V without padding.
        group: the tensor-parallel group, or None if the vocabulary is not split.
        overwrite: the backward pass may write the gradient over the logits, which nobody else may need by then.
    """

    def __init__(
        self, logits: Tensor, vocab_size: int, group: dist.ProcessGroup | None = None, *, overwrite: bool = False
    ) -> None:
        self.logits, self.vocab_size, self.group, self.overwrite = logits, vocab_size, group, overwrite

    @property
    def num_columns(self) -> int:
        return self.logits.size(-1)

    def _ask(self, question: Question, targets: Tensor | None) -> tuple[Tensor, ...]:
        shape = self.logits.shape[:-1]
        flat = self.logits.reshape(-1, self.num_columns)
        answers = _FromLogits.apply(flat, self._local(targets, shape), question, self)
        return tuple(answer.view(shape) for answer in answers)


class VocabHead(Vocabulary):
    """Logits that are made from hidden states and the LM head's weight, a chunk of tokens at a time, and never kept.

    Args:
        hidden: [..., H], the same on every rank of `group`; its gradient is this shard's share, to be summed over the group.
        weight: [V/TP, H], this rank's shard. Where it has Megatron's `main_grad`, its gradient is added there directly.
        vocab_size: V without padding.
        group: the tensor-parallel group, or None if the vocabulary is not split.
        mask: [...] bool; positions where it is False are skipped, and every answer there is zero.
        chunk_tokens: tokens whose logits exist at a time; peak memory is about three float32 tensors [chunk, V/TP].
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        vocab_size: int,
        group: dist.ProcessGroup | None = None,
        *,
        mask: Tensor | None = None,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    ) -> None:
        self.hidden, self.weight, self.vocab_size, self.group = hidden, weight, vocab_size, group
        self.mask, self.chunk_tokens = mask, chunk_tokens

    @property
    def num_columns(self) -> int:
        return self.weight.size(0)

    def _ask(self, question: Question, targets: Tensor | None) -> tuple[Tensor, ...]:
        shape = self.hidden.shape[:-1]
        hidden = self.hidden.reshape(-1, self.hidden.size(-1))
        local = self._local(targets, shape)
        if self.mask is None:
            return tuple(a.view(shape) for a in _FromHead.apply(hidden, self.weight, local, question, self))
        rows = self.mask.reshape(-1).nonzero()[:, 0]
        local = None if local is None else local[rows]
        answers = _FromHead.apply(hidden[rows], self.weight, local, question, self)
        return tuple(a.new_zeros(hidden.size(0)).index_copy(0, rows, a).view(shape) for a in answers)


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    loss: Callable[[VocabLogits, slice], Tensor],
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    *,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> Tensor:
    """A loss that is a sum over tokens, from hidden states and the head's weight: forward and backward chunk by chunk.

    `loss` sees the logits of one chunk and which rows of `hidden` they belong to, and returns its share. Its gradient is
    taken while the chunk's logits still exist, so that the head costs three matrix products, not the four of `VocabHead`,
    whose backward pass makes the logits again.

    Args:
        hidden: [N, H], otherwise as for `VocabHead`.
        weight: [V/TP, H]. Where it has Megatron's `main_grad`, the gradient is added there at once; the result must then
            enter the total loss with factor one, which the backward pass checks.

    Returns:
        The sum of the shares, a scalar that carries gradient to `hidden` and `weight`.
    """
    total: Tensor = _HeadLoss.apply(hidden, weight, loss, vocab_size, group, chunk_tokens)
    return total


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        loss: Callable[[VocabLogits, slice], Tensor],
        vocab_size: int,
        group: dist.ProcessGroup | None,
        chunk_tokens: int,
    ) -> Tensor:
        grad_hidden = torch.empty_like(hidden)
        grad_weight, returned = _weight_gradient(weight)
        total = torch.zeros((), dtype=compute_dtype(hidden), device=hidden.device)

        def take(rows: slice) -> None:  # a function, so that a chunk's logits are gone before the next ones are made
            logits = _head_logits(hidden[rows], weight).requires_grad_()
            with torch.enable_grad():
                value = loss(VocabLogits(logits, vocab_size, group, overwrite=True), rows)
            (gradient,) = torch.autograd.grad(value, logits)
            gradient = gradient.to(weight.dtype)
            torch.mm(gradient, weight, out=grad_hidden[rows])
            _add_outer(grad_weight, gradient, hidden[rows])
            total.add_(value.detach())

        for rows in _chunks(hidden.size(0), chunk_tokens):
            take(rows)
        ctx.save_for_backward(grad_hidden, None if returned is None else returned.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is None:
            torch._assert_async(factor == 1, "a loss whose head gradient is in main_grad must not be scaled")
            return grad_hidden, None, None, None, None, None
        return grad_hidden * factor, grad_weight * factor, None, None, None, None


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor | None, question: Question, vocab: VocabLogits) -> Any:
        sums = shard_sums(logits[:, : vocab.num_valid_columns], targets, question.temperature)
        scalars = merge(_all_gather(sums, vocab.group), question.temperature)
        ctx.save_for_backward(logits, targets)
        ctx.scalars, ctx.question, ctx.vocab = scalars, question, vocab
        answers = question.answers(scalars, compute_dtype(logits))
        question.mark(ctx, answers)
        return answers

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        logits, targets = ctx.saved_tensors
        columns, question = ctx.vocab.num_valid_columns, ctx.question
        out = logits if ctx.vocab.overwrite else torch.empty_like(logits)
        coefficients = question.coefficients(gradients)
        write_gradient(out[:, :columns], logits[:, :columns], targets, ctx.scalars, coefficients, question.temperature)
        # in place, as far as autograd can see: another backward pass through overwritten logits is refused by it
        out[:, columns:].zero_()
        return out, None, None, None


class _FromHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor | None, question: Question, head: VocabHead
    ) -> Any:
        sums = torch.zeros(NUM_SUMS, hidden.size(0), dtype=torch.float64, device=hidden.device)
        valid = weight[: head.num_valid_columns]
        for rows in _chunks(hidden.size(0), head.chunk_tokens):
            chunk_targets = None if targets is None else targets[rows]
            # the logits have no name here that would keep them while the next ones are made
            sums[:, rows] = shard_sums(_head_logits(hidden[rows], valid), chunk_targets, question.temperature)
        scalars = merge(_all_gather(sums, head.group), question.temperature)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.scalars, ctx.question, ctx.head = scalars, question, head
        answers = question.answers(scalars, compute_dtype(hidden))
        question.mark(ctx, answers)
        return answers

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        hidden, weight, targets = ctx.saved_tensors
        head, question = ctx.head, ctx.question
        valid = weight[: head.num_valid_columns]
        coefficients = question.coefficients(gradients)
        grad_hidden = torch.zeros_like(hidden)
        grad_weight, returned = _weight_gradient(weight) if ctx.needs_input_grad[1] else (None, None)

        def take(rows: slice) -> None:
            logits = _head_logits(hidden[rows], valid)
            write_gradient(
                logits,
                logits,
                None if targets is None else targets[rows],
                ctx.scalars.rows(rows),
                coefficients.rows(rows),
                question.temperature,
            )
            gradient = logits.to(weight.dtype)
            torch.mm(gradient, valid, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_outer(grad_weight, gradient, hidden[rows])

        for rows in _chunks(hidden.size(0), head.chunk_tokens) if len(valid) else ():
            take(rows)
        if returned is not None:
            returned = returned.to(weight.dtype)
        return grad_hidden, returned, None, None, None


def _weight_gradient(weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where the head's gradient is summed up, and what autograd is given of it."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is not None:
        return main_grad, None
    # float32 sums, as in Megatron's buffers: there is one term per chunk
    gradient = torch.zeros_like(weight, dtype=compute_dtype(weight))
    return gradient, gradient


def _add_outer(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total [V/TP, H] += gradient^T hidden, without a temporary of the weight's size."""
    columns = gradient.size(-1)
    if total.dtype == gradient.dtype:
        total[:columns].addmm_(gradient.t(), hidden)
        return
    for block in _chunks(columns, _WEIGHT_BLOCK):
        total[block].add_(gradient[:, block].t() @ hidden)


def _head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """[n, H] x [C, H] -> [n, C] in float32 (or float64), whatever the inputs: low-precision logits distort entropies."""
    dtype = compute_dtype(hidden)
    if hidden.dtype == dtype:
        return hidden @ weight.t()
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=dtype)
    logits = hidden.new_empty(hidden.size(0), weight.size(0), dtype=dtype)
    for block in _chunks(weight.size(0), _WEIGHT_BLOCK):
        logits[:, block] = hidden.to(dtype) @ weight[block].to(dtype).t()
    return logits


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def _all_gather(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[...] -> [TP, ...]"""
    if group is None or dist.get_world_size(group) == 1:
        return local[None]
    shards = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, local, group=group)
    return torch.stack(shards)
