"""Megatron `GPTModel` from a Hugging Face configuration of the Qwen3 or Llama family (dense)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_reheat.config import Config, ModelConfig
from megatron_reheat.errors import ConfigError
from megatron_reheat.model.backend import Backend
from megatron_reheat.model.head import HeadlessGPTModel
from megatron_reheat.model.layers import block_spec
from megatron_reheat.parallel.topology import Topology

FAMILIES = ("qwen3", "llama")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_hf_folder(config: ModelConfig) -> Path:
    """The local folder of `model.hf_path`; a hub name is downloaded.

    Raises:
        ConfigError: neither a folder with a config.json nor a reachable hub name.
    """
    folder = Path(config.hf_path)
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or config.hf_path.startswith((".", "/", "~")) or config.hf_path.count("/") > 1:
        lacks = "has no config.json" if folder.exists() else "does not exist"
        raise ConfigError(f"model.hf_path: {folder} {lacks}; point it at a Hugging Face model folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(config.hf_path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except Exception as error:  # the hub client raises many kinds; all mean that the model is not to be had
        raise ConfigError(
            f"model.hf_path: {config.hf_path} is neither a local folder nor a hub model that can be downloaded "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        ) from None


def read_hf_config(folder: Path) -> Any:
    """The transformers configuration, checked to be of a supported family.

    Raises:
        ConfigError: naming what is not supported.
    """
    from transformers import AutoConfig

    try:
        model_type = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"model.hf_path: {folder / 'config.json'} is not a JSON object with a model_type") from None
    if model_type not in FAMILIES:
        raise ConfigError(f"{folder}: model_type {model_type!r} is not supported; use one of {', '.join(FAMILIES)}")
    try:
        hf = AutoConfig.from_pretrained(folder)
    except (OSError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"model.hf_path: {folder / 'config.json'} is not a valid configuration ({reason})") from None
    problems = []
    if hf.hidden_act != "silu":
        problems.append(f"hidden_act {hf.hidden_act!r} (silu is)")
    if getattr(hf, "attention_bias", False) or getattr(hf, "mlp_bias", False):
        problems.append("biases in attention or MLP")
    if getattr(hf, "use_sliding_window", False):
        problems.append("sliding-window attention")
    rope = rope_parameters(hf)
    if rope["rope_type"] not in ("default", "llama3"):
        problems.append(f"rope_type {rope['rope_type']!r} (default and llama3 are)")
    elif rope["rope_type"] == "llama3" and (
        rope["low_freq_factor"] != 1
        or rope["high_freq_factor"] != 4
        or rope["original_max_position_embeddings"] != 8192
    ):
        problems.append("llama3 rope with other constants than low 1, high 4, original length 8192")
    if problems:
        raise ConfigError(f"{folder}: not supported: {'; '.join(problems)}")
    return hf


def rope_parameters(hf: Any) -> dict[str, Any]:
    """Rotary settings of transformers 4 and 5 configurations alike, with `rope_type` and `rope_theta` always there."""
    rope = dict(getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {})
    rope.setdefault("rope_type", "default")
    rope.setdefault("rope_theta", getattr(hf, "rope_theta", 10000.0))
    return rope


def head_dim(hf: Any) -> int:
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def padded_vocab_size(vocab_size: int, config: Config) -> int:
    """V rounded up so that every tensor-parallel rank holds the same number of rows."""
    multiple = config.model.vocab_pad_multiple * config.parallel.tensor
    return -(-vocab_size // multiple) * multiple


def check_layout(hf: Any, config: Config) -> None:
    """Refuses layouts the architecture cannot be cut into, before anything is built.

    Raises:
        ConfigError: naming the key to change.
    """
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    for what, count in {
        "attention heads": hf.num_attention_heads,
        "key/value heads": hf.num_key_value_heads,
        "MLP units": hf.intermediate_size,
    }.items():
        if count % tensor:
            raise ConfigError(f"parallel.tensor {tensor} does not divide the model's {count} {what}; lower it")
    if hf.num_hidden_layers % pipeline:
        raise ConfigError(
            f"parallel.pipeline {pipeline} does not divide the model's {hf.num_hidden_layers} layers; change it"
        )


def transformer_config(hf: Any, config: Config, backend: Backend) -> TransformerConfig:
    """Megatron's configuration of the same network; every fusion that needs Transformer Engine or Apex is off without."""
    dtype = DTYPES[config.model.dtype]
    fused = backend.attention == "transformer_engine"
    recompute: dict[str, Any] = {}
    if config.model.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif config.model.recompute == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=head_dim(hf),
        layernorm_epsilon=hf.rms_norm_eps,
        normalization="RMSNorm",
        qk_layernorm=hf.model_type == "qwen3",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        rotary_interleaved=False,
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        sequence_parallel=config.parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # micro-batches differ in length; the flag is refused for MoE's default dispatcher even in dense models
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # the engine's losses already divide by the global token count: Megatron must add nothing of its own
        calculate_per_token_loss=True,
        init_method_std=hf.initializer_range,
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=backend.fused_weight_gradient,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        masked_softmax_fusion=False,
        persist_layer_norm=fused,
        cross_entropy_loss_fusion=False,
        apply_rope_fusion=fused,
        deterministic_mode=False,
        **recompute,
    )


def build_model(hf: Any, config: Config, topology: Topology, backend: Backend) -> GPTModel:
    """This rank's part of the network, with Megatron's random initialisation."""
    megatron_config = transformer_config(hf, config, backend)
    rope = rope_parameters(hf)
    model_class = HeadlessGPTModel if config.model.fused_head else GPTModel
    model = model_class(
        megatron_config,
        block_spec(megatron_config, backend),
        vocab_size=padded_vocab_size(hf.vocab_size, config),
        max_sequence_length=hf.max_position_embeddings,
        pre_process=topology.is_first_stage,
        post_process=topology.is_last_stage,
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=int(rope["rope_theta"]),
        rope_scaling=rope["rope_type"] == "llama3",
        rope_scaling_factor=rope.get("factor", 8.0),
    )
    return model.to(topology.device)
