"""The few numbers of a model that memory and time follow from, without its weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_reheat.config import ModelConfig, RolloutConfig
from megatron_reheat.errors import ModelElsewhereError
from megatron_reheat.model.families import family_of, head_dim
from megatron_reheat.model.provider import hub_answers, is_local, read_hf_config, resolve_hf_folder


@dataclass(frozen=True)
class Architecture:
    """A dense decoder with grouped-query attention and a gated MLP, under Hugging Face's attribute names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int
    qk_norm: bool = True
    qkv_bias: bool = False

    @classmethod
    def from_hf(cls, hf: Any) -> Architecture:
        """Of a transformers configuration, as `read_hf_config` lets it pass."""
        return cls(
            hidden_size=hf.hidden_size,
            intermediate_size=hf.intermediate_size,
            num_hidden_layers=hf.num_hidden_layers,
            num_attention_heads=hf.num_attention_heads,
            num_key_value_heads=hf.num_key_value_heads,
            head_dim=head_dim(hf),
            vocab_size=hf.vocab_size,
            tie_word_embeddings=hf.tie_word_embeddings,
            max_position_embeddings=hf.max_position_embeddings,
            qk_norm=family_of(hf).qk_norm,
            qkv_bias=family_of(hf).qkv_bias,
        )

    @property
    def query_width(self) -> int:
        """Numbers in a token's queries, of all heads and not split."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Of the keys; the values are as wide."""
        return self.num_key_value_heads * self.head_dim

    @property
    def matrix_parameters(self) -> int:
        """Of one layer's attention and MLP: what tensor parallelism splits and matmuls read."""
        attention = 2 * (self.query_width + self.kv_width) * self.hidden_size
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def attention_length(self) -> float:
        """Of a sequence whose attention is as much work as its matrix products: each of them is 2 operations a parameter and
        token, attention 2 a channel and token before, half of the sequence in the mean, for keys and values each."""
        return self.matrix_parameters / self.query_width

    @property
    def vector_parameters(self) -> int:
        """Of one layer's norms and biases."""
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        return norms + (self.query_width + 2 * self.kv_width if self.qkv_bias else 0)

    @property
    def head_parameters(self) -> int:
        """Of the embedding, and of the LM head as well where the two are not tied."""
        return self.vocab_size * self.hidden_size

    @property
    def num_tensors(self) -> int:
        """Of the model's folder: each layer's seven matrices, norms and biases, and what is not a layer's."""
        each = 7 + 2 + 2 * self.qk_norm + 3 * self.qkv_bias
        return self.num_hidden_layers * each + (2 if self.tie_word_embeddings else 3)

    @property
    def num_parameters(self) -> int:
        """Of the whole model, without padding; a tied embedding counts once."""
        layers = self.num_hidden_layers * (self.matrix_parameters + self.vector_parameters)
        return layers + (1 if self.tie_word_embeddings else 2) * self.head_parameters + self.hidden_size

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Keys and values in all layers, not split by tensor parallelism."""
        return 2 * self.num_hidden_layers * self.kv_width * bytes_per_value


VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ENGINE_OVERHEAD_GIB = 2.0  # vLLM's activations and CUDA graphs


def kv_cache_bytes(
    model: Architecture, rollout: RolloutConfig, dtype: str, gpu_gib: float, overhead_gib: float = ENGINE_OVERHEAD_GIB
) -> float:
    """On each GPU of an engine: rollout.kv_cache_mb, or what vLLM's share leaves beside its weights; may be negative.

    `dtype` counts where rollout.dtype is auto.
    """
    if rollout.kv_cache_mb:
        return float(rollout.kv_cache_mb << 20)
    share = rollout.gpu_memory_utilization * gpu_gib - overhead_gib
    return share * 2**30 - engine_weight_bytes(model, rollout, dtype)


def engine_weight_bytes(model: Architecture, rollout: RolloutConfig, dtype: str) -> float:
    """On each GPU of an engine."""
    value = VALUE_BYTES[dtype if rollout.dtype == "auto" else rollout.dtype]
    return float(model.num_parameters * value) / rollout.tensor


def _qwen3(hidden: int, mlp: int, layers: int, heads: int, *, tied: bool) -> Architecture:
    return Architecture(hidden, mlp, layers, heads, 8, 128, 151_936, tied, max_position_embeddings=32_768)


# From the models' published config.json files, for machines that cannot reach the hub. The instruct models' context is longer
# (40,960): the smaller number of the base models is on the safe side.
QWEN3 = {
    "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen3-8B": _qwen3(4096, 12288, 36, 32, tied=False),
    "Qwen3-14B": _qwen3(5120, 17408, 40, 40, tied=False),
    "Qwen3-32B": _qwen3(5120, 25600, 64, 64, tied=False),
}


def _qwen25(
    hidden: int,
    mlp: int,
    layers: int,
    heads: int,
    groups: int,
    channels: int = 128,
    vocab: int = 151_936,
    context: int = 32_768,
) -> Architecture:
    tied = vocab == 151_936
    return Architecture(
        hidden, mlp, layers, heads, groups, channels, vocab, tied, context, qk_norm=False, qkv_bias=True
    )


# The same; 7B and larger have a longer context than is said here.
QWEN25 = {
    "Qwen2.5-0.5B": _qwen25(896, 4864, 24, 14, 2, channels=64),
    "Qwen2.5-1.5B": _qwen25(1536, 8960, 28, 12, 2),
    "Qwen2.5-3B": _qwen25(2048, 11008, 36, 16, 2),
    "Qwen2.5-7B": _qwen25(3584, 18944, 28, 28, 4, vocab=152_064),
    "Qwen2.5-14B": _qwen25(5120, 13824, 48, 40, 8, vocab=152_064),
    "Qwen2.5-32B": _qwen25(5120, 27648, 64, 40, 8, vocab=152_064),
    "Qwen2.5-Math-1.5B": _qwen25(1536, 8960, 28, 12, 2, context=4096),
    "Qwen2.5-Math-7B": _qwen25(3584, 18944, 28, 28, 4, vocab=152_064, context=4096),
}
QWEN = QWEN3 | QWEN25
LLAMA_31_8B = Architecture(4096, 14336, 32, 32, 8, 128, 128_256, False, 131_072, qk_norm=False)


def read_architecture(config: ModelConfig) -> Architecture:
    """From the folder's config.json, the built-in table for Qwen's hub names, or config.json alone from the hub.

    Raises:
        ModelElsewhereError: no such folder, or a hub name that cannot be looked up from here.
        ConfigError: an unsupported architecture.
    """
    name = config.hf_path
    owner, _, model = name.rpartition("/")
    exists = os.path.exists(name)
    if owner == "Qwen" and not exists and (known := QWEN.get(model.removesuffix("-Base").removesuffix("-Instruct"))):
        return known
    if is_local(name) and not exists:
        raise ModelElsewhereError(f"model.hf_path: {name} does not exist; point it at a Hugging Face model folder")
    if exists:
        return Architecture.from_hf(read_hf_config(resolve_hf_folder(config)))
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(name, "config.json", revision=config.revision, local_files_only=not hub_answers())
        folder = Path(file).parent
    except Exception as error:  # the hub client raises many kinds; all mean that the file is not to be had
        raise ModelElsewhereError(
            f"model.hf_path: {name} is not a local folder, its config.json cannot be fetched ({type(error).__name__}), and "
            f"its numbers are not built in (Qwen/ {', '.join(QWEN)} are); point it at the model's folder"
        ) from None
    return Architecture.from_hf(read_hf_config(folder))
