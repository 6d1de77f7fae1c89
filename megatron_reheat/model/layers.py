"""What Megatron's local layers lack without Transformer Engine: attention over packed sequences, and a parallel RMSNorm."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_reheat.model.backend import Backend


def block_spec(config: TransformerConfig, backend: Backend) -> Any:
    """Layer specification of this pipeline stage for Megatron's `GPTModel`."""
    if backend.attention == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with Megatron's builder signature.

    Under sequence parallelism each rank normalises its own slice of the sequence; the mark asks Megatron to sum the
    weight's gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LengthClass(NamedTuple):
    """Packed sequences that are attended as one padded block [S, L]: where each of their n tokens lies, [n] all.

    `position` is a token's place in the packing, `row` and `column` that in the block.
    """

    shape: tuple[int, int]
    position: Tensor
    row: Tensor
    column: Tensor


def length_classes(borders: Sequence[int], device: torch.device) -> Iterator[LengthClass]:
    """Sequences whose lengths lie between the same powers of two, so that at most half of a block is padding.

    In one block with a long sequence, short ones would cost as much as that one does.
    """
    members: dict[int, list[tuple[int, int]]] = {}
    for start, end in itertools.pairwise(borders):
        if end > start:
            members.setdefault((end - start - 1).bit_length(), []).append((start, end - start))
    for sequences in members.values():
        starts, lengths = torch.tensor(sequences, device=device).T
        count, longest = sum(n for _, n in sequences), max(n for _, n in sequences)
        row = torch.repeat_interleave(torch.arange(len(sequences), device=device), lengths, output_size=count)
        column = torch.arange(count, device=device) - (lengths.cumsum(0) - lengths)[row]
        yield LengthClass((len(sequences), longest), starts[row] + column, row, column)


class PackedAttention(MegatronModule):
    """Causal attention within each packed sequence, through torch's scaled_dot_product_attention.

    Sequences of similar lengths are scattered into a padded [S, L] block, attended in one call and gathered back. Padding is on
    the right, so the causal mask alone keeps it away from real tokens.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self"
        assert config.context_parallel_size == 1 and not config.attention_dropout
        self.scale = 1 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [T, heads, d], key and value [T, groups, d] -> [T, heads x d]."""
        assert packed_seq_params is not None and attention_bias is None
        results, positions = [], []
        for shape, position, row, column in length_classes(packed_seq_params.cu_seqlens_q.tolist(), query.device):
            query_block, key_block, value_block = (
                # [T, heads, d] -> [S, heads, L, d]
                x.new_zeros(*shape, *x.shape[1:]).index_put((row, column), x[position]).transpose(1, 2)
                for x in (query, key, value)
            )
            block = scaled_dot_product_attention(
                query_block,
                key_block,
                value_block,
                is_causal=True,
                scale=self.scale,
                enable_gqa=query.size(1) != key.size(1),
            )
            results.append(block.transpose(1, 2)[row, column])
            positions.append(position)
        out = torch.empty_like(query).index_copy(0, torch.cat(positions), torch.cat(results))
        return out.reshape(query.size(0), -1)
