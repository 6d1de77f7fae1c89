"""What Megatron's local layers lack without Transformer Engine: attention over packed sequences, and a parallel RMSNorm."""

from __future__ import annotations

import math
from typing import Any

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


class PackedAttention(MegatronModule):
    """Causal attention within each packed sequence, through torch's scaled_dot_product_attention.

    Sequences are scattered into a padded [S, L] block, attended in one call and gathered back. Padding is on the right, so
    the causal mask alone keeps it away from real tokens.
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
        borders = packed_seq_params.cu_seqlens_q.long()
        lengths = borders.diff()
        num_tokens = query.size(0)
        row = torch.repeat_interleave(torch.arange(len(lengths), device=query.device), lengths, output_size=num_tokens)
        column = torch.arange(num_tokens, device=query.device) - borders[row]
        shape = (len(lengths), packed_seq_params.max_seqlen_q)

        def scatter(x: Tensor) -> Tensor:
            """[T, heads, d] -> [S, heads, L, d]"""
            return x.new_zeros(*shape, *x.shape[1:]).index_put((row, column), x).transpose(1, 2)

        out = scaled_dot_product_attention(
            scatter(query),
            scatter(key),
            scatter(value),
            is_causal=True,
            scale=self.scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        return out.transpose(1, 2)[row, column].reshape(num_tokens, -1)
