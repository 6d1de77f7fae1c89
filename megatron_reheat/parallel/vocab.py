"""Vocabulary-parallel log-probabilities, entropy and tempered KL: exact, closed form, one collective forward, none backward.

Tensor parallelism splits the vocabulary: each rank holds logits `[T, V/TP]`. Everything the losses need follows from a few
sums per token, taken on each shard relative to the shard's own maximum and merged like an online softmax. With z the
logits, m their global maximum and d = z - m:

    s1 = sum e^d        w1 = sum e^d d          A1 = log s1     M1 = w1 / s1
    sT = sum e^(d/T)    wT = sum e^(d/T) d      AT = log sT     MT = wT / sT

    log q(y)      = d_y - A1                    q   = softmax(z), the policy
    log p_T(y)    = d_y/T - AT                  p_T = softmax(z/T), the teacher of TS-OPSD (arXiv 2606.00755)
    H(q)          = A1 - M1                     H(p_T) = AT - MT/T
    KL(p_T || q)  = (1/T - 1) MT - AT + A1      d/dz_v = q_v - p_T,v             teacher detached
    KL(q || p_T)  = (1 - 1/T) M1 - A1 + AT      d/dz_v = (1 - 1/T) q_v (d_v - M1)

The backward pass needs only the merged scalars, so no tensor of the logits' size outlives the forward pass except the
logits themselves. Differences of nearly equal probabilities (a sharp policy against its own tempered self) are taken through
expm1, and the scalars are kept in float64: entropies of 1e-4 nats and their gradients stay exact to float32 rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Direction = Literal["forward", "reverse"]

DEFAULT_CHUNK_TOKENS = 1024

_LOWEST = torch.finfo(torch.float32).min
# below this e^d is zero in any dtype; finite, so that 0 x d stays 0 where a logit is -inf
_NO_PROBABILITY = -1e30


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
class VocabLogits:
    """This rank's shard of the logits, with what is needed to reduce over the whole vocabulary.

    logits:      [..., V/TP], any floating dtype
    vocab_size:  V without padding; columns from it on (Megatron pads V to a multiple of TP) take no probability
    group:       the tensor-parallel group, or None if the vocabulary is not split
    """

    logits: Tensor
    vocab_size: int
    group: dist.ProcessGroup | None = None
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS

    @property
    def first_column(self) -> int:
        return self.logits.size(-1) * _group_rank(self.group)

    @property
    def num_valid_columns(self) -> int:
        """How many of this shard's columns are real vocabulary; the rest is padding, which may fill a whole shard."""
        return min(max(self.vocab_size - self.first_column, 0), self.logits.size(-1))

    def logprobs(self, targets: Tensor, *, temperature: float = 1.0) -> VocabLogprobs:
        """Log-probabilities of `targets` [...] (global token ids) at `temperature`, and the entropy at temperature 1."""
        self._check_targets(targets)
        logprobs, entropy = _Logprobs.apply(self._flat(), targets.reshape(-1), temperature, self)
        shape = self.logits.shape[:-1]
        return VocabLogprobs(logprobs.view(shape), entropy.view(shape))

    def tempered_kl(self, *, temperature: float, direction: Direction, targets: Tensor | None = None) -> TemperedKL:
        """KL between the policy and its own detached, flattened self. See `losses.tempered_kl`."""
        if direction not in ("forward", "reverse"):
            raise ValueError(f"direction must be 'forward' or 'reverse', not {direction!r}")
        if targets is not None:
            self._check_targets(targets)
        flat_targets = None if targets is None else targets.reshape(-1)
        outputs = _TemperedKL.apply(self._flat(), flat_targets, temperature, direction, self)
        kl, entropy, teacher_entropy, logprobs = (o.view(self.logits.shape[:-1]) for o in outputs)
        return TemperedKL(kl, entropy, teacher_entropy, None if targets is None else logprobs)

    def _flat(self) -> Tensor:
        return self.logits.reshape(-1, self.logits.size(-1))

    def _check_targets(self, targets: Tensor) -> None:
        assert targets.shape == self.logits.shape[:-1], (targets.shape, self.logits.shape)


@dataclass(frozen=True)
class _Scalars:
    """Merged per-token scalars [N] in float64, the same on every rank of the group. `log_*` are A1 and AT, `mean_*` M1, MT."""

    maximum: Tensor
    log_sum: Tensor
    mean: Tensor
    tempered_log_sum: Tensor
    tempered_mean: Tensor
    target: Tensor  # z_y - maximum


def _reduce(logits: Tensor, targets: Tensor | None, temperature: float, vocab: VocabLogits) -> _Scalars:
    columns = vocab.num_valid_columns
    local = logits.new_zeros(6, logits.size(0), dtype=torch.float64)
    local[0] = _LOWEST  # a shard that is all padding never owns the maximum
    if columns:
        for rows in _chunks(logits.size(0), vocab.chunk_tokens):
            local[:5, rows] = _local_sums(logits[rows, :columns], temperature)
        if targets is not None:
            local[5] = _owned_target_logits(logits, targets, vocab.first_column, columns)
    shards = _all_gather(local, vocab.group)  # [TP, 6, N]
    return _merge(shards, temperature)


def _local_sums(logits: Tensor, temperature: float) -> Tensor:
    """[N, C] -> [5, N] float64: maximum and the four sums relative to it."""
    maximum = logits.amax(-1).to(_compute_dtype(logits)).clamp_min(_LOWEST)
    shifted = _shifted(logits, maximum)
    exp = shifted.exp()
    s1 = exp.sum(-1, dtype=torch.float64)
    w1 = exp.mul_(shifted).sum(-1, dtype=torch.float64)
    tempered = torch.exp(shifted / temperature, out=exp)
    s_t = tempered.sum(-1, dtype=torch.float64)
    w_t = tempered.mul_(shifted).sum(-1, dtype=torch.float64)
    return torch.stack([maximum.double(), s1, w1, s_t, w_t])


def _owned_target_logits(logits: Tensor, targets: Tensor, first_column: int, columns: int) -> Tensor:
    """[N] float64: the target's logit where this shard owns the target, else 0."""
    local_ids = targets - first_column
    owned = (local_ids >= 0) & (local_ids < columns)
    values = logits.gather(-1, local_ids.clamp(0, columns - 1)[:, None])[:, 0].double()
    return torch.where(owned, values, 0.0)


def _merge(shards: Tensor, temperature: float) -> _Scalars:
    """Online-softmax merge in rank order, so that every rank gets bitwise the same result."""
    maximum = shards[:, 0].amax(0)
    down = shards[:, 0] - maximum  # <= 0: how far each shard's maximum lies below the global one
    scale, tempered_scale = down.exp(), (down / temperature).exp()
    s1 = (shards[:, 1] * scale).sum(0)
    w1 = ((shards[:, 2] + shards[:, 1] * down) * scale).sum(0)
    s_t = (shards[:, 3] * tempered_scale).sum(0)
    w_t = ((shards[:, 4] + shards[:, 3] * down) * tempered_scale).sum(0)
    return _Scalars(maximum, s1.log(), w1 / s1, s_t.log(), w_t / s_t, shards[:, 5].sum(0) - maximum)


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float, vocab: VocabLogits) -> Any:
        s = _reduce(logits, targets, temperature, vocab)
        ctx.save_for_backward(logits, targets, s.maximum, s.log_sum, s.mean, s.tempered_log_sum)
        ctx.temperature, ctx.vocab = temperature, vocab
        ctx.set_materialize_grads(False)  # an output nobody uses costs nothing in backward
        dtype = _compute_dtype(logits)
        return (s.target / temperature - s.tempered_log_sum).to(dtype), (s.log_sum - s.mean).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Any:
        logits, targets, maximum, log_sum, mean, tempered_log_sum = ctx.saved_tensors
        columns = ctx.vocab.num_valid_columns
        grad = torch.zeros_like(logits)
        for rows in _chunks(logits.size(0), ctx.vocab.chunk_tokens) if columns else ():
            d = _shifted(logits[rows, :columns], maximum[rows])
            g = torch.zeros_like(d)
            if grad_logprobs is not None:
                log_p = d / ctx.temperature - tempered_log_sum[rows, None].to(d.dtype)
                local_ids = targets[rows] - ctx.vocab.first_column
                g += _logprob_gradient(log_p, local_ids) * (grad_logprobs[rows] / ctx.temperature)[:, None]
            if grad_entropy is not None:
                q = (d - log_sum[rows, None].to(d.dtype)).exp()
                g -= grad_entropy[rows, None] * q * (d - mean[rows, None].to(d.dtype))
            grad[rows, :columns] = g.to(grad.dtype)
        return grad, None, None, None


def _logprob_gradient(log_p: Tensor, local_ids: Tensor) -> Tensor:
    """[N, C] 1[v = y] - p_v; at a nearly certain target 1 - p cancels in float32, expm1 keeps it."""
    owned = (local_ids >= 0) & (local_ids < log_p.size(-1))
    ids = local_ids.clamp(0, log_p.size(-1) - 1)[:, None]
    gradient = -log_p.exp()
    at_target = torch.where(owned[:, None], -torch.expm1(log_p.gather(-1, ids)), gradient.gather(-1, ids))
    return gradient.scatter_(-1, ids, at_target)


class _TemperedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor | None, temperature: float, direction: Direction, vocab: VocabLogits
    ) -> Any:
        s = _reduce(logits, targets, temperature, vocab)
        gap = s.tempered_log_sum - s.log_sum
        flattening = 1.0 - 1.0 / temperature
        kl = -flattening * s.tempered_mean - gap if direction == "forward" else flattening * s.mean + gap
        ctx.save_for_backward(logits, s.maximum, s.log_sum, s.mean, s.tempered_log_sum)
        ctx.temperature, ctx.direction, ctx.vocab = temperature, direction, vocab
        dtype = _compute_dtype(logits)
        entropy = (s.log_sum - s.mean).to(dtype)
        teacher_entropy = (s.tempered_log_sum - s.tempered_mean / temperature).to(dtype)
        logprobs = (s.target - s.log_sum).to(dtype)
        ctx.mark_non_differentiable(entropy, teacher_entropy, logprobs)
        # rounding may leave a KL of exactly zero a hair below it
        return kl.clamp_min(0.0).to(dtype), entropy, teacher_entropy, logprobs

    @staticmethod
    def backward(ctx: Any, grad_kl: Tensor, *_: Any) -> Any:
        logits, maximum, log_sum, mean, tempered_log_sum = ctx.saved_tensors
        columns = ctx.vocab.num_valid_columns
        flattening = 1.0 - 1.0 / ctx.temperature
        grad = torch.zeros_like(logits)
        for rows in _chunks(logits.size(0), ctx.vocab.chunk_tokens) if columns else ():
            d = _shifted(logits[rows, :columns], maximum[rows])
            if ctx.direction == "forward":
                # q - p_T without cancellation: the larger of the two times (1 - ratio), the ratio in log space
                gap = (tempered_log_sum[rows] - log_sum[rows])[:, None].to(d.dtype)
                log_ratio = flattening * d + gap  # log q - log p_T
                larger = d - log_sum[rows, None].to(d.dtype) - log_ratio.clamp_max(0.0)
                g = -larger.exp() * torch.expm1(-log_ratio.abs()) * log_ratio.sign()
            else:
                q = (d - log_sum[rows, None].to(d.dtype)).exp()
                g = flattening * q * (d - mean[rows, None].to(d.dtype))
            grad[rows, :columns] = (g * grad_kl[rows, None]).to(grad.dtype)
        return grad, None, None, None, None


def _shifted(logits: Tensor, maximum: Tensor) -> Tensor:
    """[N, C] d = z - m, finite also where z is -inf."""
    dtype = _compute_dtype(logits)
    return (logits.to(dtype) - maximum[:, None].to(dtype)).clamp_min_(_NO_PROBABILITY)


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunks(num_rows: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, num_rows)) for i in range(0, num_rows, size)]


def _group_rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def _all_gather(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[...] -> [TP, ...]"""
    if group is None or dist.get_world_size(group) == 1:
        return local[None]
    shards = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, local, group=group)
    return torch.stack(shards)
