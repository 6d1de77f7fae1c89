"""Attention over packed sequences: each sees itself alone, causally, and a long one does not make short ones dear."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_reheat.model.layers import PackedAttention
from megatron_reheat.model.packed_sequences import PackedSequences, length_classes

HEADS, GROUPS, DIM = 4, 2, 8
LENGTHS = [
    [1],
    [5, 5, 5],
    [1, 2, 3, 4, 5, 6, 7, 8, 9],
    [40, 1, 3, 33, 2, 64, 17, 1],
]


def borders_of(lengths: list[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def packed(lengths: list[int], frequencies: Tensor | None = None) -> PackedSequences:
    borders = torch.tensor(borders_of(lengths), dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return PackedSequences.of(borders, max(lengths), positions, frequencies)


def attention(softmax_scale: float | None = None) -> PackedAttention:
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * DIM, num_attention_heads=HEADS, num_query_groups=GROUPS, attention_dropout=0.0,
        use_cpu_initialization=True,
    )  # fmt: skip
    return PackedAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=softmax_scale)


def dense(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float) -> Tensor:
    """One sequence after the other, written out."""
    outputs = []
    for start, end in itertools.pairwise(borders_of(lengths)):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(HEADS // GROUPS, dim=0) for x in (k, v))
        logits = q @ k.transpose(1, 2) * scale
        logits = logits.masked_fill(torch.ones(end - start, end - start).triu(1).bool(), -math.inf)
        outputs.append((logits.softmax(-1) @ v).transpose(0, 1).flatten(1))
    return torch.cat(outputs)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_each_sequence_sees_itself_alone(lengths: list[int], scale: float | None) -> None:
    torch.manual_seed(0)
    inputs = [
        torch.randn(sum(lengths), n, DIM, dtype=torch.float64, requires_grad=True) for n in (HEADS, GROUPS, GROUPS)
    ]
    weights = torch.randn(sum(lengths), HEADS * DIM, dtype=torch.float64)
    ours = attention(scale)(*inputs, None, packed_seq_params=packed(lengths))
    expected = dense(*inputs, lengths, scale or DIM**-0.5)
    assert (ours - expected).abs().max() < 1e-12
    gradients = [torch.autograd.grad((out * weights).sum(), inputs) for out in (ours, expected)]
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*gradients, strict=True))


def test_padding_is_less_than_half_of_every_block() -> None:
    lengths = [2048, *range(1, 97), 0, 700]
    found = list(length_classes(borders_of(lengths), torch.device("cpu")))
    assert sorted(torch.cat([c.position for c in found]).tolist()) == list(range(sum(lengths)))
    for block in found:
        assert math.prod(block.shape) < 2 * len(block.position)
    # all in one block would be 98 x 2048
    assert sum(math.prod(block.shape) for block in found) < 1.5 * sum(lengths)


class OneRank:
    """A context-parallel group of one, as far as Megatron's rotation asks."""

    size = staticmethod(lambda: 1)
    rank = staticmethod(lambda: 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_queries_and_keys_are_rotated_as_by_megatron_to_the_bit(lengths: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    states = torch.randn(sum(lengths), HEADS, DIM).to(dtype).requires_grad_()
    frequencies, weights = 1.0 / 1e4 ** (torch.arange(0, DIM, 2) / DIM), torch.randn(sum(lengths), HEADS, DIM).to(dtype)
    sequences = packed(lengths, frequencies)
    ours = sequences.rotated(states[:, None])[:, 0]
    angles = torch.outer(torch.arange(max(lengths)).float(), frequencies)
    table = torch.cat([angles, angles], dim=-1)[:, None, None]
    config = attention().config
    theirs = apply_rotary_pos_emb(states, table, config, cu_seqlens=sequences.cu_seqlens_q, cp_group=OneRank())
    assert ours.dtype == dtype and torch.equal(ours, theirs)
    assert torch.equal(ours, states) == (max(lengths) == 1)
    gradients = [torch.autograd.grad((out * weights).sum(), states)[0] for out in (ours, theirs)]
    assert torch.equal(*gradients)
