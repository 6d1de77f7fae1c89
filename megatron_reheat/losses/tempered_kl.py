"""The tempered KL: the loss of TS-OPSD (arXiv 2606.00755, section 3) and its family, exact over the whole vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_reheat.parallel.vocab import (
    DEFAULT_CHUNK_TOKENS,
    Direction,
    TemperedKL,
    VocabLogits,
    VocabLogprobs,
)


def tempered_kl(
    logits: Tensor,
    *,
    temperature: float,
    direction: Direction = "forward",
    targets: Tensor | None = None,
    vocab_size: int | None = None,
    group: Any = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> TemperedKL:
    """KL between a policy and its own temperature-flattened self, which is detached.

    The teacher is the same logits divided by `temperature`: no second forward pass, no second logits tensor. Forward is
    KL(teacher || policy), reverse is KL(policy || teacher). The backward pass is closed form and communicates nothing.

    Args:
        logits: [..., V/TP], any floating dtype; this rank's vocabulary shard. Reduced in float32, max-shifted.
        temperature: of the teacher; above 1 flattens.
        targets: [...] global token ids; asks for their log-probabilities at temperature 1 from the same pass.
        vocab_size: V without the padding columns, which take no probability; by default every column counts.
        group: tensor-parallel process group; None if the vocabulary is not split.
        chunk_tokens: tokens whose float32 copies exist at a time.

    Returns:
        `TemperedKL(kl, entropy, teacher_entropy, logprobs)`, each [...] float32 in nats, the same on every rank of `group`.
        Only `kl` carries gradient.
    """
    vocab = _vocab(logits, vocab_size, group, chunk_tokens)
    return vocab.tempered_kl(temperature=temperature, direction=direction, targets=targets)


def vocab_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: Any = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> VocabLogprobs:
    """Log-probabilities of `targets` [...] at `temperature`, and the entropy at temperature 1, from one pass.

    Arguments and guarantees as for `tempered_kl`; both results carry gradient.
    """
    return _vocab(logits, vocab_size, group, chunk_tokens).logprobs(targets, temperature=temperature)


def vocab_entropy(
    logits: Tensor, *, vocab_size: int | None = None, group: Any = None, chunk_tokens: int = DEFAULT_CHUNK_TOKENS
) -> Tensor:
    """Entropy [...] in nats at temperature 1, float32; carries gradient. Arguments as for `tempered_kl`."""
    targets = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return _vocab(logits, vocab_size, group, chunk_tokens).logprobs(targets).entropy


def _vocab(logits: Tensor, vocab_size: int | None, group: Any, chunk_tokens: int) -> VocabLogits:
    if vocab_size is None:
        shards = 1 if group is None else group.size()
        vocab_size = logits.size(-1) * shards
    return VocabLogits(logits, vocab_size, group, chunk_tokens)
