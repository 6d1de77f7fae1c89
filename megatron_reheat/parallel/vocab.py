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
themselves (`VocabLogits`), or none at all: `VocabHead` makes them again chunk by chunk, and `head.head_loss`, for a loss that
is a sum over tokens, is done with a chunk before it makes the next. Scalars are kept in float64: entropies of 1e-4 nats and
their gradients stay exact to float32 rounding. How far the policy is from another distribution takes two passes (`divergence`).
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_reheat.parallel.divergence import Comparison, HeadDivergence, LogitsDivergence
from megatron_reheat.parallel.head_products import head_gradient, head_logits
from megatron_reheat.parallel.shards import gather_shards
from megatron_reheat.parallel.vocab_kernels import NUM_SUMS, chunks, compute_dtype, merge, shard_sums, write_gradient
from megatron_reheat.parallel.vocab_rows import RowCoefficients, RowScalars

Direction = Literal["forward", "reverse"]

DEFAULT_CHUNK_TOKENS = 1024


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
    """What is asked of the logits: log-probabilities at `temperature`, or the KL to the policy tempered by it.

    Or the mean of its entropy flow, for which q^2 is q tempered by 1/2, but for its normalizer.
    """

    what: Literal["logprobs", "forward", "reverse", "flow"]
    temperature: float

    def answers(self, s: RowScalars, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """(logprobs, entropy), (mean flow,), or (kl, entropy, teacher entropy, logprobs at temperature 1); each [N]."""
        if self.what == "flow":
            return (((s.tempered_log_sum - 2 * s.log_sum).exp() * (s.tempered_mean - s.mean)).to(dtype),)
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
        """Tells autograd, in the forward pass, which of the answers carry gradient."""
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

    @torch.no_grad()
    def mean_entropy_flow(self) -> Tensor:
        """[...] sum_v q_v^2 (log q_v + H) at temperature 1, without gradient.

        The mean, over tokens v drawn from the policy q, of their flow q_v (log q_v + H). To first order, a step that adds
        eps A (1[v = y] - q_v) to the logits changes the entropy H by -eps A (flow of y - mean flow), which is what OPEFO
        (arXiv 2605.11491) estimates.
        """
        (flow,) = self._ask(Question("flow", 0.5), None)
        return flow

    def kl_to(self, other: Vocabulary, *, direction: Direction = "reverse", temperature: float = 1.0) -> Tensor:
        """KL divergence per position between the policy, self, and a detached teacher, both at `temperature`.

        Args:
            other: the teacher, for the same positions and the same shard of the vocabulary, in any form; gets no gradient.
            direction: reverse is KL(self || other), forward KL(other || self).
            temperature: divides both sides' logits; the result is not scaled by its square.

        Returns:
            [...] float32 in nats, never negative, the same on every rank of the group; carries gradient to self. Infinite
            where the distribution that takes the mean allows a token that the other one excludes (a logit of -inf).
        """
        if direction not in ("forward", "reverse"):
            raise ValueError(f"direction must be 'forward' or 'reverse', not {direction!r}")
        return self._compare(other, Comparison(direction, temperature))

    def js_to(self, other: Vocabulary, *, temperature: float = 1.0) -> Tensor:
        """Jensen-Shannon divergence per position, in [0, ln 2] nats; otherwise as `kl_to`."""
        return self._compare(other, Comparison("js", temperature))

    @abstractmethod
    def flattened(self, temperature: float) -> Vocabulary:
        """The same prediction with its logits divided by `temperature`, detached, over these where they may be overwritten."""

    def _compare(self, other: Vocabulary, comparison: Comparison) -> Tensor:
        mine, theirs = ((*v.shape, v.num_columns, v.vocab_size) for v in (self, other))
        if mine != theirs:
            raise ValueError(
                f"cannot compare predictions of different shapes (..., shard, vocabulary): {mine}, {theirs}"
            )
        if comparison.temperature <= 0:
            raise ValueError(f"temperature must be positive, not {comparison.temperature}")
        return self._diverge(other, comparison)

    @abstractmethod
    def _ask(self, question: Question, targets: Tensor | None) -> tuple[Tensor, ...]:
        """The question's answers, one value per position."""

    @abstractmethod
    def _diverge(self, other: Vocabulary, comparison: Comparison) -> Tensor:
        """The comparison's value per position."""

    chunk_tokens: int  # positions whose logits may be asked for at a time

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Of the positions."""

    @abstractmethod
    def sources(self) -> tuple[Tensor, ...]:
        """What the logits are or are made of, position by position, detached."""

    @abstractmethod
    def logits_of(self, sources: Sequence[Tensor], rows: slice | Tensor) -> Tensor:
        """[n, C] logits of some of the flattened positions, without the padding columns."""

    _num_readers = 0

    def will_be_read(self) -> None:
        """A backward pass may come that reads the logits; it then says `has_been_read`."""
        self._num_readers += torch.is_grad_enabled()

    def has_been_read(self) -> None:
        """Said in the backward pass that `will_be_read` announced."""
        self._num_readers -= 1

    @property
    @abstractmethod
    def num_columns(self) -> int:
        """This shard's columns, padding included."""

    @property
    def first_column(self) -> int:
        """Global token id of this shard's first column."""
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
        overwrite: the backward pass may write the gradient over the logits, which nobody else may need by then. Of several
            questions to this object the one whose backward pass comes last does so; the others' gradients are new tensors.
    """

    chunk_tokens = sys.maxsize

    def __init__(
        self, logits: Tensor, vocab_size: int, group: dist.ProcessGroup | None = None, *, overwrite: bool = False
    ) -> None:
        self.logits, self.vocab_size, self.group, self.overwrite = logits, vocab_size, group, overwrite

    @property
    def num_columns(self) -> int:
        return self.logits.size(-1)

    @property
    def shape(self) -> torch.Size:
        return self.logits.shape[:-1]

    def _ask(self, question: Question, targets: Tensor | None) -> tuple[Tensor, ...]:
        self.will_be_read()
        answers = _FromLogits.apply(self._flat, self._local(targets, self.shape), question, self)
        return tuple(answer.view(self.shape) for answer in answers)

    def _diverge(self, other: Vocabulary, comparison: Comparison) -> Tensor:
        self.will_be_read()
        if self.logits.requires_grad:
            other.will_be_read()
        value: Tensor = LogitsDivergence.apply(self._flat, self, other, comparison)
        return value.view(self.shape)

    def flattened(self, temperature: float) -> VocabLogits:
        logits = self.logits.detach()
        out = logits if self.overwrite else torch.empty_like(logits)
        return VocabLogits(
            torch.div(logits, temperature, out=out), self.vocab_size, self.group, overwrite=self.overwrite
        )

    @property
    def _flat(self) -> Tensor:
        return self.logits.reshape(-1, self.num_columns)

    def sources(self) -> tuple[Tensor, ...]:
        return (self._flat.detach(),)

    def logits_of(self, sources: Sequence[Tensor], rows: slice | Tensor) -> Tensor:
        return sources[0][rows, : self.num_valid_columns]

    def gradient_place(self, logits: Tensor) -> Tensor:
        """Where a backward pass writes its gradient: over the logits, if it may and is the last one that reads them."""
        self.has_been_read()
        return logits if self.overwrite and self._num_readers == 0 else torch.empty_like(logits)


class VocabHead(Vocabulary):
    """Logits that are made from hidden states and the LM head's weight, a chunk of tokens at a time, and never kept.

    Args:
        hidden: [..., H], the same on every rank of `group`; its gradient is this shard's share, to be summed over the group.
        weight: [V/TP, H], this rank's shard. Where it has Megatron's `main_grad`, its gradient is added there directly.
        vocab_size: V without padding.
        group: the tensor-parallel group, or None if the vocabulary is not split.
        mask: [...] bool; positions where it is False are skipped, and every answer there is zero. Of two heads that are
            compared, the policy's counts.
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

    @property
    def shape(self) -> torch.Size:
        return self.hidden.shape[:-1]

    def _ask(self, question: Question, targets: Tensor | None) -> tuple[Tensor, ...]:
        local, rows = self._local(targets, self.shape), self._rows
        if rows is None:
            hidden = self._flat
        else:
            hidden, local = self._flat[rows], None if local is None else local[rows]
        return tuple(self._spread(a, rows) for a in _FromHead.apply(hidden, self.weight, local, question, self))

    def _diverge(self, other: Vocabulary, comparison: Comparison) -> Tensor:
        rows = self._rows
        if self.hidden.requires_grad or self.weight.requires_grad:
            other.will_be_read()
        hidden = self._flat if rows is None else self._flat[rows]
        return self._spread(HeadDivergence.apply(hidden, self.weight, rows, self, other, comparison), rows)

    def flattened(self, temperature: float) -> VocabHead:
        hidden, weight = self.hidden.detach() / temperature, self.weight.detach()
        return VocabHead(hidden, weight, self.vocab_size, self.group, mask=self.mask, chunk_tokens=self.chunk_tokens)

    @property
    def _flat(self) -> Tensor:
        return self.hidden.reshape(-1, self.hidden.size(-1))

    @property
    def _rows(self) -> Tensor | None:
        return None if self.mask is None else self.mask.reshape(-1).nonzero()[:, 0]

    def _spread(self, answer: Tensor, rows: Tensor | None) -> Tensor:
        if rows is not None:
            answer = answer.new_zeros(self.shape.numel()).index_copy(0, rows, answer)
        return answer.view(self.shape)

    def sources(self) -> tuple[Tensor, ...]:
        return self._flat.detach(), self.weight.detach()

    def logits_of(self, sources: Sequence[Tensor], rows: slice | Tensor) -> Tensor:
        hidden, weight = sources
        return head_logits(hidden[rows], weight[: self.num_valid_columns])


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor | None, question: Question, vocab: VocabLogits) -> Any:
        sums = shard_sums(logits[:, : vocab.num_valid_columns], targets, question.temperature)
        scalars = merge(gather_shards(sums, vocab.group), question.temperature)
        ctx.save_for_backward(logits, targets)
        ctx.scalars, ctx.question, ctx.vocab = scalars, question, vocab
        answers = question.answers(scalars, compute_dtype(logits))
        question.mark(ctx, answers)
        return answers

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        logits, targets = ctx.saved_tensors
        columns, question = ctx.vocab.num_valid_columns, ctx.question
        out = ctx.vocab.gradient_place(logits)
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
        for rows in chunks(hidden.size(0), head.chunk_tokens):
            chunk_targets = None if targets is None else targets[rows]
            # the logits have no name here that would keep them while the next ones are made
            sums[:, rows] = shard_sums(head_logits(hidden[rows], valid), chunk_targets, question.temperature)
        scalars = merge(gather_shards(sums, head.group), question.temperature)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.scalars, ctx.question, ctx.head = scalars, question, head
        answers = question.answers(scalars, compute_dtype(hidden))
        question.mark(ctx, answers)
        return answers

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        hidden, weight, targets = ctx.saved_tensors
        head, question, scalars = ctx.head, ctx.question, ctx.scalars
        coefficients = question.coefficients(gradients)

        def write(logits: Tensor, rows: slice) -> None:
            local = None if targets is None else targets[rows]
            shares = scalars.rows(rows), coefficients.rows(rows)
            write_gradient(logits, logits, local, *shares, question.temperature)

        columns, wanted = head.num_valid_columns, ctx.needs_input_grad[1]
        return *head_gradient(hidden, weight, columns, write, head.chunk_tokens, wanted), None, None, None
