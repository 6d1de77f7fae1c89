"""The last stage without Megatron's logits: the model ends at its hidden states, and the losses apply the LM head."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor


class HeadlessGPTModel(GPTModel):
    """A GPTModel whose last stage returns [T, 1, H] hidden states after the final norm; its parameters stay the same."""

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


def head_weight(model: GPTModel) -> Tensor:
    """[V/TP, H] this rank's shard of the LM head, which is the embedding's where they are tied."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def head_input(hidden: Tensor, *, sequence_parallel: bool) -> Tensor:
    """[T or T/TP, 1, H] -> [T, H] on every tensor-parallel rank; backward sums the ranks' gradients."""
    if sequence_parallel:
        return gather_from_sequence_parallel_region(hidden)[:, 0]
    return copy_to_tensor_model_parallel_region(hidden)[:, 0]
