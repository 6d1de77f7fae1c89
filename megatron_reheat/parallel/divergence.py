"""KL and Jensen-Shannon divergence between the policy and another, detached distribution over the vocabulary, per position.

Two passes over each chunk of logits, because both normalizers must be known first: Jensen-Shannon's mixture needs them, and
with them the KL of two nearly equal distributions keeps its digits (`pair_kernels`). After each pass the shards exchange a few
scalars per position. The backward pass exchanges nothing and writes the gradient of the policy's logits in closed form:

    reverse  KL(p || q)  p (x - sum p x) / T         forward  KL(q || p)  (p - q) / T         js  p (g - sum p g) / T

with p the policy, q the other one, x = log(p/q) and g = log(2p / (p + q)) / 2. No logits are kept that were not there before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_reheat.parallel.head_products import head_gradient, head_logits
from megatron_reheat.parallel.pair_kernels import Measure, pair_sums, write_pair_gradient
from megatron_reheat.parallel.shards import gather_shards
from megatron_reheat.parallel.vocab_kernels import chunks, compute_dtype, merge, shard_sums
from megatron_reheat.parallel.vocab_rows import PairScalars

if TYPE_CHECKING:
    from megatron_reheat.parallel.vocab import VocabHead, VocabLogits, Vocabulary


@dataclass(frozen=True)
class Comparison:
    """What is asked of two vocabularies: a divergence of their distributions, both at `temperature`."""

    measure: Measure
    temperature: float

    def values(self, logits: Tensor, others: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, PairScalars]:
        """[n, C] both shards' logits -> [n] float64 divergence, and what the gradient needs."""
        scalars = self.normalized(gather_shards(self.normalizing_sums(logits, others), group))
        return self.settled(gather_shards(self.shard_sums(logits, others, scalars), group), scalars)

    def normalizing_sums(self, logits: Tensor, others: Tensor) -> Tensor:
        """The first pass over a shard: [2, 6, n] float64."""
        top = logits.argmax(-1) if logits.size(-1) else None
        return torch.stack([shard_sums(logits, None, self.temperature), shard_sums(others, top, self.temperature)])

    def normalized(self, shards: Tensor) -> PairScalars:
        """[TP, 2, 6, n] -> scalars without the center."""
        own, other = (merge(shards[:, i], self.temperature) for i in range(2))
        owner = shards[:, 0, 0].argmax(0, keepdim=True)  # of the policy's top token
        at_top = shards[:, 1, 5].gather(0, owner)[0]
        log_sums = own.tempered_log_sum, other.tempered_log_sum
        return PairScalars(own.maximum, log_sums[0], other.maximum, log_sums[1], at_top, torch.zeros_like(at_top))

    def shard_sums(self, logits: Tensor, others: Tensor, scalars: PairScalars) -> Tensor:
        """The second pass over a shard: [2, n] float64."""
        return pair_sums(logits, others, scalars, self.measure, self.temperature)

    def settled(self, shards: Tensor, scalars: PairScalars) -> tuple[Tensor, PairScalars]:
        """[TP, 2, n] -> the divergence [n], and the scalars with their center."""
        value, product = shards.sum(0)  # in rank order: bitwise the same on every rank
        if self.measure == "forward":
            # value - product = sum (p - q), which is zero but for the normalizers' rounding, to first order part of p - q
            scalars = replace(scalars, log_sum=scalars.log_sum + (value - product).log1p())
        else:
            scalars = replace(scalars, center=product)
        return value.clamp(0.0, math.log(2) if self.measure == "js" else math.inf), scalars

    def write_gradient(self, out: Tensor, logits: Tensor, others: Tensor, scalars: PairScalars, factor: Tensor) -> None:
        """[n, C] into `out`, which may be `logits`; `factor` [n] is the gradient of the divergence."""
        write_pair_gradient(out, logits, others, scalars, factor / self.temperature, self.measure, self.temperature)


class LogitsDivergence(torch.autograd.Function):
    """Of logits that exist, [N, C] with padding columns."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, vocab: VocabLogits, other: Vocabulary, comparison: Comparison) -> Tensor:
        theirs, columns = other.sources(), vocab.num_valid_columns
        values, parts = [logits.new_empty(0, dtype=torch.float64)], []
        for rows in chunks(len(logits), other.chunk_tokens):
            value, scalars = comparison.values(logits[rows, :columns], other.logits_of(theirs, rows), vocab.group)
            values.append(value)
            parts.append(scalars)
        ctx.save_for_backward(logits, *theirs)
        ctx.vocab, ctx.other, ctx.comparison, ctx.parts = vocab, other, comparison, parts
        return torch.cat(values).to(compute_dtype(logits))

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:
        logits, *theirs = ctx.saved_tensors
        ctx.other.has_been_read()
        out, columns = ctx.vocab.gradient_place(logits), ctx.vocab.num_valid_columns
        for rows, scalars in zip(chunks(len(logits), ctx.other.chunk_tokens), ctx.parts, strict=True):
            others = ctx.other.logits_of(theirs, rows)
            ctx.comparison.write_gradient(out[rows, :columns], logits[rows, :columns], others, scalars, factor[rows])
        # in place, as far as autograd can see: another backward pass through overwritten logits is refused by it
        out[:, columns:].zero_()
        return out, None, None, None


class HeadDivergence(torch.autograd.Function):
    """Of hidden states [N, H], at `positions` [N] of the other vocabulary; both sides' logits exist for a chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        positions: Tensor | None,
        head: VocabHead,
        other: Vocabulary,
        comparison: Comparison,
    ) -> Tensor:
        theirs, valid = other.sources(), weight[: head.num_valid_columns]
        values, parts = [hidden.new_empty(0, dtype=torch.float64)], []
        chunk_tokens = min(head.chunk_tokens, other.chunk_tokens)
        for rows in chunks(len(hidden), chunk_tokens):
            # the logits have no name here that would keep them while the next ones are made
            value, scalars = comparison.values(
                head_logits(hidden[rows], valid),
                other.logits_of(theirs, rows if positions is None else positions[rows]),
                head.group,
            )
            values.append(value)
            parts.append(scalars)
        ctx.save_for_backward(hidden, weight, positions, *theirs)
        ctx.head, ctx.other, ctx.comparison, ctx.chunk_tokens = head, other, comparison, chunk_tokens
        ctx.parts = parts
        return torch.cat(values).to(compute_dtype(hidden))

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:
        hidden, weight, positions, *theirs = ctx.saved_tensors
        ctx.other.has_been_read()

        def write(logits: Tensor, rows: slice) -> None:
            others = ctx.other.logits_of(theirs, rows if positions is None else positions[rows])
            scalars = ctx.parts[rows.start // ctx.chunk_tokens]
            ctx.comparison.write_gradient(logits, logits, others, scalars, factor[rows])

        columns, wanted = ctx.head.num_valid_columns, ctx.needs_input_grad[1]
        gradients = head_gradient(hidden, weight, columns, write, ctx.chunk_tokens, wanted)
        return *gradients, None, None, None, None
