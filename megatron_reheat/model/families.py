"""The model families, one entry each: how a family differs from a Llama, which all of them are otherwise.

A new one whose layers have no other parts needs an entry here and a tiny model in `tests/tiny_models.py`, and nothing else: the
tests hold it against transformers and vLLM in every layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Family:
    """`architecture` is what vLLM goes by, and must mean the same network as transformers' `model_type`.

    `qk_norm`: queries and keys are normalised, head by head. `qkv_bias`: their projections and the values' have a bias.
    """

    architecture: str
    qk_norm: bool = False
    qkv_bias: bool = False


# by model_type
FAMILIES = {
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
}
PLANNED = {"moe": "mixtures of experts are planned for later"}

# rope_type -> what is read of its settings besides the base; transformers and vLLM read the same
ROPE_SETTINGS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "attention_factor",
            "truncate",
        }
    ),
}


def family_of(hf: Any) -> Family:
    """Of a configuration that `read_hf_config` let pass."""
    return FAMILIES[hf.model_type]


def head_dim(hf: Any) -> int:
    """Channels of one head; hidden_size over the number of heads where the configuration does not say."""
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def rope_parameters(hf: Any) -> dict[str, Any]:
    """Rotary settings of transformers 4 and 5 configurations alike, with `rope_type` and `rope_theta` always there."""
    rope = dict(getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {})
    rope.setdefault("rope_type", "default")
    rope.setdefault("rope_theta", getattr(hf, "rope_theta", 10000.0))
    return rope


def rotary_frequencies(hf: Any) -> tuple[Tensor, float]:
    """The angle per position of each pair of channels, [head_dim / 2] float32, and what queries and keys are multiplied by."""
    rope, dim = rope_parameters(hf), head_dim(hf)
    if rope["rope_type"] == "default":
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](hf, torch.device("cpu"))
    return frequencies.float(), float(factor)
