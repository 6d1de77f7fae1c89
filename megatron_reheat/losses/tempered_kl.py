"""The tempered KL: the loss of TS-OPSD (arXiv 2606.00755, section 3) and its family, exact over the whole vocabulary.

Two forms with the same values and gradients: from logits that exist, and `fused_*` from hidden states and the LM head's weight,
which never hold logits of more than a chunk of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_reheat.parallel.vocab import (
    DEFAULT_CHUNK_TOKENS,
    Direction,
    TemperedKL,
    VocabHead,
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
    overwrite_logits: bool = False,
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
        overwrite_logits: lets the backward pass write the gradient over the logits, so that it allocates nothing.

    Returns:
        `TemperedKL(kl, entropy, teacher_entropy, logprobs)`, each [...] float32 in nats, the same on every rank of `group`.
        Only `kl` carries gradient.
    """
    vocab = VocabLogits(logits, _vocab_size(vocab_size, logits.size(-1), group), group, overwrite=overwrite_logits)
    return vocab.tempered_kl(temperature=temperature, direction=direction, targets=targets)


def vocab_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: Any = None,
    overwrite_logits: bool = False,
) -> VocabLogprobs:
    """Log-probabilities of `targets` [...] at `temperature`, and the entropy at temperature 1, from one pass.

    Arguments and guarantees as for `tempered_kl`; both results carry gradient.
    """
    vocab = VocabLogits(logits, _vocab_size(vocab_size, logits.size(-1), group), group, overwrite=overwrite_logits)
    return vocab.logprobs(targets, temperature=temperature)


def vocab_entropy(logits: Tensor, *, vocab_size: int | None = None, group: Any = None) -> Tensor:
    """Entropy [...] in nats at temperature 1, float32; carries gradient. Arguments as for `tempered_kl`."""
    targets = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return vocab_logprobs(logits, targets, vocab_size=vocab_size, group=group).entropy


def fused_tempered_kl(
    hidden: Tensor,
    weight: Tensor,
    *,
    temperature: float,
    direction: Direction = "forward",
    targets: Tensor | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    group: Any = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> TemperedKL:
    """`tempered_kl(hidden @ weight.T, ...)` without ever holding [tokens, V/TP]: the head is applied chunk by chunk.

    The backward pass makes each chunk's logits again. Peak memory beyond inputs and gradients is O(chunk_tokens x V/TP).

    Args:
        hidden: [..., H], the same on every rank of `group`. Its gradient is this shard's share: sum it over the group, as
            Megatron's `copy_to_tensor_model_parallel_region` does.
        weight: [V/TP, H], this rank's shard; its gradient is added to Megatron's `main_grad` where it has one.
        mask: [...] bool; positions where it is False cost nothing and give zeros.
        chunk_tokens: tokens whose logits exist at a time.

    Other arguments and results as for `tempered_kl`. Logits are float32 whatever the dtype of hidden and weight.
    """
    head = VocabHead(
        hidden, weight, _vocab_size(vocab_size, weight.size(0), group), group, mask=mask, chunk_tokens=chunk_tokens
    )
    return head.tempered_kl(temperature=temperature, direction=direction, targets=targets)


def fused_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    group: Any = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> VocabLogprobs:
    """`vocab_logprobs(hidden @ weight.T, targets)` without the logits; arguments as for `fused_tempered_kl`."""
    head = VocabHead(
        hidden, weight, _vocab_size(vocab_size, weight.size(0), group), group, mask=mask, chunk_tokens=chunk_tokens
    )
    return head.logprobs(targets, temperature=temperature)


def _vocab_size(vocab_size: int | None, columns: int, group: Any) -> int:
    return columns * (1 if group is None else group.size()) if vocab_size is None else vocab_size
