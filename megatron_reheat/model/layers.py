"""What Megatron's local layers lack without Transformer Engine: attention over packed sequences, and a parallel RMSNorm."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_reheat.model.backend import Backend
from megatron_reheat.model.packed_sequences import PackedSequences


def block_spec(config: TransformerConfig, backend: Backend, vp_stage: int | None = None) -> Any:
    """Layer specification of this pipeline stage, or of one of its virtual stages, for Megatron's `GPTModel`."""
    if backend.attention == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.module = PackedSelfAttention
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layers = [layer] * get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with Megatron's builder signature.

    Under sequence parallelism each rank normalises its own slice of the sequence; the mark asks Megatron to sum the
    weight's gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PackedSelfAttention(SelfAttention):
    """Megatron's self-attention, with queries and keys rotated by what the micro-batch knows of its positions.

    Megatron's own rotation of packed sequences looks up the angles anew for every layer, and for queries and keys each.
    """

    _sequences: PackedSequences

    def forward(self, *arguments: Any, packed_seq_params: PackedSequences, **options: Any) -> Any:
        self._sequences = packed_seq_params
        try:
            return super().forward(*arguments, packed_seq_params=packed_seq_params, **options)
        finally:
            del self._sequences

    def get_query_key_value_tensors(self, *arguments: Any, **options: Any) -> Any:
        query, key, value = super().get_query_key_value_tensors(*arguments, **options)
        return self._sequences.rotated(query), self._sequences.rotated(key), value


class PackedAttention(MegatronModule):
    """Causal attention within each packed sequence, through torch's scaled_dot_product_attention.

    Sequences of similar lengths are scattered into a padded [S, L] block, attended in one call and gathered back. Padding is on
    the right, so the causal mask alone keeps it away from real tokens.

    Under context parallelism a rank attends its own queries to all keys and values, which the group gathers and whose gradients
    it sums and scatters. Unlike Transformer Engine's ring, that takes memory for all of them, and masks of [S, L/CP, L] bytes.
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
        assert not config.attention_dropout
        self.scale = 1 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """query [T, heads, d], key and value [T, groups, d] -> [T, heads x d]."""
        assert packed_seq_params is not None and attention_bias is None
        packed, is_grouped = packed_seq_params, query.size(1) != key.size(1)
        if packed.split is not None:
            both = torch.stack([key, value], dim=1)
            key, value = gather_from_sequence_parallel_region(both, group=packed.split.group).unbind(1)
        queries, keys = packed.blocks(query, packed.query_classes), packed.blocks(key, packed.classes)
        attended = [
            scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=self.scale, enable_gqa=is_grouped)
            for q, k, v, mask in zip(queries, keys, packed.blocks(value, packed.classes), packed.masks, strict=True)
        ]
        return packed.unblocked(attended).flatten(1)
