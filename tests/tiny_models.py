"""Tiny transformers models with random weights, saved as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = ("qwen3_tied", "qwen3_untied", "qwen2", "llama", "mistral")
# 131 is prime: no tensor-parallel size divides it, so every layout pads the vocabulary
VOCAB_SIZE = 131


def save_tiny_model(family: str, folder: Path, *, vocab_size: int = VOCAB_SIZE, seed: int = 0, **changes: Any) -> Path:
    """Grouped-query attention, head_dim != hidden / heads for Qwen3, weights large enough for logits to differ. `changes` are
    to the configuration."""
    torch.manual_seed(seed)
    shared = {
        "vocab_size": vocab_size,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.1,
        **changes,
    }
    model: Any
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shared, tie_word_embeddings=False, rope_theta=500000.0))
    elif family == "mistral":
        model = MistralForCausalLM(
            MistralConfig(**{"head_dim": 16, **shared}, sliding_window=None, tie_word_embeddings=False)
        )
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shared, tie_word_embeddings=True))
    else:
        tied = family == "qwen3_tied"
        model = Qwen3ForCausalLM(Qwen3Config(**shared, head_dim=32, tie_word_embeddings=tied, rope_theta=1000000.0))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):  # ones would hide a norm that is loaded into the wrong place
            parameter.data.uniform_(0.5, 1.5)
        if name.endswith("bias"):  # so would zeros
            parameter.data.uniform_(-0.5, 0.5)
    model.save_pretrained(folder)
    return folder
