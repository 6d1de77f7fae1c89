"""How the predictions of two policies differ at each token: exact over the whole vocabulary, a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_reheat.parallel.head_products import head_logits
from megatron_reheat.parallel.vocab import VocabLogits
from megatron_reheat.parallel.vocab_kernels import chunks

TOP = 10
CHUNK_TOKENS = 256  # at a vocabulary of 150,000 a tensor of logits is 150 MB


class TokenFigures(NamedTuple):
    """[T] each, at temperature 1.

    KL divergences, entropies and the taken token's log-probabilities are in nats, float32; `overlap` is the share of the
    policies' `TOP` most likely tokens that they have in common; a rank is 1 plus the number of tokens that are more likely than
    the taken one, int64.
    """

    kl_ab: Tensor
    kl_ba: Tensor
    entropy_a: Tensor
    entropy_b: Tensor
    logprob_a: Tensor
    logprob_b: Tensor
    overlap: Tensor
    rank_a: Tensor
    rank_b: Tensor

    @classmethod
    def joined(cls, parts: Iterable[TokenFigures]) -> TokenFigures:
        """Of all the tokens, in order; there has to be one part at least."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))

    def at(self, tokens: Tensor) -> TokenFigures:
        """Of some of the tokens, named by a mask or by their indices."""
        return TokenFigures(*(values[tokens] for values in self))


@torch.no_grad()
def compare_tokens(
    hidden_a: Tensor,
    head_a: Tensor,
    hidden_b: Tensor,
    head_b: Tensor,
    targets: Tensor,
    chunk_tokens: int = CHUNK_TOKENS,
) -> TokenFigures:
    """
    Args:
        hidden_a: [T, H] what A's LM head reads; B's may have another width.
        head_a: [V, H] the LM head's weight.
        targets: [T] int64, the tokens that were taken.
        chunk_tokens: tokens whose logits, [chunk, V] float32 for each policy, exist at a time.

    Returns:
        The figures, on the CPU.
    """
    return TokenFigures.joined(
        _compare(head_logits(hidden_a[rows], head_a), head_logits(hidden_b[rows], head_b), targets[rows])
        for rows in chunks(len(targets), chunk_tokens)
    )


def _compare(logits_a: Tensor, logits_b: Tensor, targets: Tensor) -> TokenFigures:
    """[n, V] both -> [n] each."""
    a, b = (VocabLogits(logits, logits.size(-1)) for logits in (logits_a, logits_b))
    own_a, own_b = a.logprobs(targets), b.logprobs(targets)
    figures = TokenFigures(
        kl_ab=a.kl_to(b),
        kl_ba=b.kl_to(a),
        entropy_a=own_a.entropy,
        entropy_b=own_b.entropy,
        logprob_a=own_a.logprobs,
        logprob_b=own_b.logprobs,
        overlap=_overlap(logits_a, logits_b),
        rank_a=_ranks(logits_a, targets),
        rank_b=_ranks(logits_b, targets),
    )
    return TokenFigures(*(values.cpu() for values in figures))


def _overlap(logits_a: Tensor, logits_b: Tensor) -> Tensor:
    top = min(TOP, logits_a.size(-1))
    best_a, best_b = (logits.topk(top).indices for logits in (logits_a, logits_b))
    return (best_a[:, :, None] == best_b[:, None, :]).sum((1, 2)) / top


def _ranks(logits: Tensor, targets: Tensor) -> Tensor:
    return 1 + (logits > logits.gather(1, targets[:, None])).sum(1)
