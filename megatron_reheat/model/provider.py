"""Megatron `GPTModel` from a Hugging Face configuration of one of the `families` (dense)."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_reheat.config import Config, ModelConfig
from megatron_reheat.errors import ConfigError
from megatron_reheat.files import problem_of_file, problem_of_folder
from megatron_reheat.model.backend import Backend
from megatron_reheat.model.chunks import ModelChunks
from megatron_reheat.model.families import (
    FAMILIES,
    PLANNED,
    ROPE_SETTINGS,
    family_of,
    head_dim,
    rope_parameters,
    rotary_frequencies,
)
from megatron_reheat.model.head import HeadlessGPTModel
from megatron_reheat.model.layers import block_spec
from megatron_reheat.parallel.topology import Topology

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FILE_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt")
HUB_WAIT_S = 1.5
MAX_SIZE = 2**31 - 1  # of a dimension, which CUDA's kernels count in 32 bits
MAX_LAYERS = 10_000
ADAPTER = "adapter_config.json"
MERGE_ADAPTER = "merge it into the model that it adapts, and point at the result"
# Where quantised weights are announced: by transformers and most tools, by older compressed-tensors, by MLX
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
QUANTIZATION_FILE = "hf_quant_config.json"  # by older ModelOpt
# What changes the logits of related models, with the value under which it does not. Some of these keys are read by vLLM
# for the families here, some by transformers, some by neither; a model that was trained with one is not computed here.
INERT_VALUES: dict[str, Any] = {
    "attention_chunk_size": None,
    "attention_multiplier": None,
    "attn_logit_softcapping": None,
    "bias": False,
    "clip_qkv": None,
    "dual_chunk_attention_config": None,
    "embedding_multiplier": 1,
    "final_logit_softcapping": None,
    "is_causal": True,
    "logit_scale": 1,
    "logits_scaling": 1,
    "no_rope_layers": None,
    "per_layer_config": None,
    "qkv_bias": False,
    "query_pre_attn_scalar": None,
    "residual_multiplier": 1,
    "transformers_weights": None,
}


def is_local(hf_path: str) -> bool:
    """Whether a `model.hf_path` can only be meant as a folder, whether or not that exists; else it is a hub name."""
    return os.path.exists(hf_path) or hf_path.startswith((".", "/", "~")) or hf_path.count("/") > 1


def resolve_hf_folder(config: ModelConfig) -> Path:
    """The local folder of `model.hf_path`; a hub name is downloaded.

    Raises:
        ConfigError: neither a folder with a config.json nor a reachable hub name.
    """
    folder = Path(config.hf_path)
    if is_local(config.hf_path):
        if config.revision is not None:
            raise ConfigError(
                f"model.revision {config.revision}: {folder} is a folder of this machine, which has no revisions; clear it, or "
                "give a hub name as model.hf_path"
            )
        if problem := problem_of_folder(folder):
            raise ConfigError(f"model.hf_path: {folder} cannot be read: {problem}")
        if (folder / "config.json").is_file():
            _refuse_what_is_no_file(folder)
            return folder
        if (folder / ADAPTER).is_file():
            raise ConfigError(f"model.hf_path: {folder} holds an adapter without its model; {MERGE_ADAPTER}")
        lacks = "has no config.json" if os.path.exists(folder) else "does not exist"
        raise ConfigError(f"model.hf_path: {folder} {lacks}; point it at a Hugging Face model folder")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]
    offline = not hub_answers()
    name = config.hf_path if config.revision is None else f"{config.hf_path} at model.revision {config.revision}"
    try:
        return Path(
            snapshot_download(
                config.hf_path, revision=config.revision, allow_patterns=patterns, local_files_only=offline
            )
        )
    except Exception as error:  # the hub client raises many kinds; all mean that the model is not to be had
        reason = "the hub does not answer" if offline else f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ConfigError(
            f"model.hf_path: {name} is neither a local folder nor a hub model that can be downloaded ({reason}); "
            "correct the name, or point it at a model's folder"
        ) from None


def _refuse_what_is_no_file(folder: Path) -> None:
    """Before anything reads them: a pipe or a device would be read for ever, or passed over as if it were not there."""
    for path in sorted(folder.iterdir()):
        if path.suffix in FILE_SUFFIXES and (problem := problem_of_file(path)):
            raise ConfigError(f"model.hf_path: {path} cannot be read: {problem}, or copy the model again")


def hub_answers() -> bool:
    """Whether a connection to the hub can be made, within HUB_WAIT_S: its client would try for more than a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    endpoint = urlsplit(constants.ENDPOINT)
    if getproxies().get(endpoint.scheme):  # which is not for us to find out
        return True
    answered = threading.Event()

    def connect() -> None:
        port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
        with contextlib.suppress(OSError), socket.create_connection((endpoint.hostname or "", port), HUB_WAIT_S):
            answered.set()
        done.set()

    # in a thread, because nothing limits the time that a name is looked up in
    done = threading.Event()
    threading.Thread(target=connect, daemon=True).start()
    done.wait(HUB_WAIT_S)
    return answered.is_set()


def read_hf_config(folder: Path) -> Any:
    """The transformers configuration, checked to describe a network that is computed here as transformers computes it.

    `eos_token_id` is None where config.json does not name one: the token that a class has for a default may be any in
    this vocabulary.

    Raises:
        ConfigError: naming what is not supported.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    try:
        tree = json.loads(path.read_text())
        model_type = tree["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(
            f"model.hf_path: {path} is not a JSON object with a model_type; copy or download the model again"
        ) from None
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        later = "".join(f" ({plan})" for word, plan in PLANNED.items() if word in str(model_type))
        raise ConfigError(
            f"model.hf_path: {path}: model_type {model_type!r} is not supported{later}; use one of {', '.join(FAMILIES)}"
        )
    if quantization := _quantization(folder, tree):
        raise ConfigError(
            f"model.hf_path: {folder} is quantised ({quantization}), and only unquantised weights can be trained; point it "
            "at the model that this one was made from"
        )
    problems = [
        f"{key} {tree[key]!r}"
        for key, inert in INERT_VALUES.items()
        if key in tree and tree[key] not in (None, [], {}, inert)
    ]
    if not problems:  # with some of them the configuration's own attributes cannot be read
        try:
            hf = AutoConfig.from_pretrained(folder)
        except Exception as error:  # each of its validators raises a kind of its own
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"model.hf_path: {path} is not a valid configuration ({reason}); correct it, or download the model again"
            ) from None
        problems = list(_unsupported(hf))
    if problems:
        raise ConfigError(f"model.hf_path: {path}: not supported: {'; '.join(problems)}")
    if "eos_token_id" not in tree:
        hf.eos_token_id = None
    return hf


def _quantization(folder: Path, tree: dict[str, Any]) -> str | None:
    for key in QUANTIZATION_KEYS:
        if (value := tree.get(key)) is not None:
            method = value.get("quant_method") if isinstance(value, dict) else None
            return f"config.json's {key}{f': {method}' if method else ''}"
    return QUANTIZATION_FILE if (folder / QUANTIZATION_FILE).is_file() else None


def _unsupported(hf: Any) -> Iterator[str]:
    """What of a configuration that transformers accepts is not computed here, or not by vLLM as by transformers."""
    if hf.hidden_act != "silu":
        yield f"hidden_act {hf.hidden_act!r} (silu is)"
    if getattr(hf, "attention_bias", False) or getattr(hf, "mlp_bias", False):
        yield "biases in attention or MLP"
    # vLLM applies sliding_window wherever it stands; Qwen3's configuration clears it unless use_sliding_window is set
    layer_types = set(getattr(hf, "layer_types", None) or ())
    if getattr(hf, "use_sliding_window", False) or getattr(hf, "sliding_window", None):
        yield "sliding-window attention (use_sliding_window, sliding_window)"
    elif layer_types - {"full_attention"}:
        yield f"layer_types {sorted(layer_types)} (full_attention is)"
    if hf.architectures != [architecture := family_of(hf).architecture]:
        yield f"architectures {hf.architectures!r} (of {hf.model_type}, [{architecture!r}] is)"
    yield from _unsupported_sizes(hf)
    yield from _unsupported_rope(hf)


def _unsupported_sizes(hf: Any) -> Iterator[str]:
    sizes = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
    )
    if wrong := [f"{name} {getattr(hf, name)}" for name in sizes if getattr(hf, name) < 1]:
        yield f"{', '.join(wrong)} (1 and more is)"
        return
    if large := [f"{name} {getattr(hf, name)}" for name in sizes if getattr(hf, name) > MAX_SIZE]:
        yield f"{', '.join(large)} (at most {MAX_SIZE} is)"
        return
    if hf.num_hidden_layers > MAX_LAYERS:
        yield f"num_hidden_layers {hf.num_hidden_layers} (at most {MAX_LAYERS} is)"
        return
    for name in ("rms_norm_eps", "initializer_range"):
        if not (math.isfinite(value := getattr(hf, name)) and value >= 0):
            yield f"{name} {value} (0 and more is)"
    if hf.num_attention_heads % hf.num_key_value_heads:
        yield f"num_attention_heads {hf.num_attention_heads}, no multiple of num_key_value_heads {hf.num_key_value_heads}"
    if head_dim(hf) < 2 or head_dim(hf) % 2:
        yield f"head_dim {head_dim(hf)} (even ones are)"
    if hf.pad_token_id is not None and hf.pad_token_id >= hf.vocab_size:
        yield f"pad_token_id {hf.pad_token_id} (the vocabulary ends at {hf.vocab_size - 1})"


def _unsupported_rope(hf: Any) -> Iterator[str]:
    rope = rope_parameters(hf)
    kind, theta = rope["rope_type"], rope["rope_theta"]
    if kind not in ROPE_SETTINGS:
        yield f"rope_type {kind!r} ({', '.join(ROPE_SETTINGS)} are)"
        return
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < math.inf:
        yield f"rope_theta {theta!r} (a number above 0 is)"
    # some kinds are computed by transformers without it, by vLLM with it
    if rope.get("partial_rotary_factor") not in (None, 1):
        yield f"partial_rotary_factor {rope['partial_rotary_factor']!r} (1 is)"
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *ROPE_SETTINGS[kind]}
    if foreign := [key for key, value in rope.items() if key not in known and value is not None]:
        yield f"{', '.join(foreign)} in the settings of {kind} rope"
    yield from _unsupported_scaling(hf, rope)


def _unsupported_scaling(hf: Any, rope: dict[str, Any]) -> Iterator[str]:
    kind, needed = rope["rope_type"], ROPE_SETTINGS[rope["rope_type"]]
    numbers = needed - {"truncate"}
    wrong = [
        f"{key} {value!r}"
        for key in sorted(numbers)
        if (value := rope.get(key)) is not None
        and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf)
    ]
    if kind != "default" and rope.get("factor") is None:
        wrong.append("no factor")
    if wrong:
        yield f"{', '.join(wrong)} in the settings of {kind} rope (numbers above 0 are)"
        return
    length = rope.get("original_max_position_embeddings")
    if length is None:
        return
    # transformers lets a value outside of the rope settings overrule the one inside, vLLM does not
    outside = getattr(hf, "original_max_position_embeddings", None)
    if outside not in (None, length):
        yield f"original_max_position_embeddings {outside} beside {length} in the rope settings"
    if kind == "yarn" and length * rope["factor"] < hf.max_position_embeddings:  # vLLM makes no angles for more
        yield f"yarn rope of {length} x {rope['factor']:g} positions for max_position_embeddings {hf.max_position_embeddings}"


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
    if hf.num_hidden_layers % (pipeline * config.parallel.virtual_pipeline):
        raise ConfigError(
            f"parallel.virtual_pipeline {config.parallel.virtual_pipeline} does not divide the "
            f"{hf.num_hidden_layers // pipeline} layers of a pipeline rank; change it"
        )


def transformer_config(hf: Any, config: Config, backend: Backend) -> TransformerConfig:
    """Megatron's configuration of the same network; every fusion that needs Transformer Engine or Apex is off without."""
    dtype, interleaved = DTYPES[config.model.dtype], config.parallel.virtual_pipeline > 1
    fused, family = backend.attention == "transformer_engine", family_of(hf)
    recompute: dict[str, Any] = {}
    if config.model.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif config.model.recompute == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": backend.recomputed_modules}
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=head_dim(hf),
        layernorm_epsilon=hf.rms_norm_eps,
        normalization="RMSNorm",
        qk_layernorm=family.qk_norm,
        add_qkv_bias=family.qkv_bias,
        softmax_scale=rotary_frequencies(hf)[1] ** 2 / math.sqrt(head_dim(hf)),
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        rotary_interleaved=False,
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        virtual_pipeline_model_parallel_size=config.parallel.virtual_pipeline if interleaved else None,
        # two interleaved ranks are each other's neighbour on both sides, and would mix up the messages of a batch
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        context_parallel_size=config.parallel.context,
        cp_comm_type="p2p",  # Transformer Engine's ring of keys and values, which asks nothing of the number of heads
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


def build_model(hf: Any, config: Config, topology: Topology, backend: Backend) -> ModelChunks:
    """This rank's part of the network, with Megatron's random initialisation."""
    megatron_config, count = transformer_config(hf, config, backend), config.parallel.virtual_pipeline
    return ModelChunks(tuple(_build_chunk(hf, config, topology, backend, megatron_config, i) for i in range(count)))


def _build_chunk(
    hf: Any, config: Config, topology: Topology, backend: Backend, megatron_config: TransformerConfig, index: int
) -> GPTModel:
    count = config.parallel.virtual_pipeline
    stage = index if count > 1 else None
    fused = backend.attention == "transformer_engine"  # and with it the rotary embedding
    model_class = HeadlessGPTModel if config.model.fused_head else GPTModel
    model = model_class(
        megatron_config,
        block_spec(megatron_config, backend, stage),
        vocab_size=padded_vocab_size(hf.vocab_size, config),
        max_sequence_length=hf.max_position_embeddings,
        pre_process=topology.is_first_stage and index == 0,
        post_process=topology.is_last_stage and index == count - 1,
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        position_embedding_type="rope" if fused else "none",
        vp_stage=stage,
    )
    # Megatron computes the default kind and one of llama3's; what queries and keys are multiplied by is in softmax_scale
    frequencies = rotary_frequencies(hf)[0].to(topology.device)
    if fused:
        model.rotary_pos_emb.inv_freq = frequencies
    model.frequencies = None if fused else frequencies  # for `PackedSequences`, whose layers rotate queries and keys
    return model.to(topology.device)
