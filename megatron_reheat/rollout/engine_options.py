"""What every vLLM engine of a run is started with, in our processes and in servers, and the environment it gets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_reheat.config import RolloutConfig
from megatron_reheat.processes import helper_environment

CPU_BATCHED_TOKENS = 8192
CPU_KV_CACHE_MB = 1024
LEAST_SHARE = 0.01  # of a GPU
GPU_BATCHED_TOKENS = 2048  # vLLM's smallest default; it wants one for every sequence at least


def engine_options(config: RolloutConfig, model_path: str, *, dtype: str, seed: int, on_cpu: bool) -> dict[str, Any]:
    """vLLM's engine arguments by name. `dtype` counts when `rollout.dtype` is auto."""
    options: dict[str, Any] = {
        "model": model_path,
        "tensor_parallel_size": config.tensor,
        "dtype": dtype if config.dtype == "auto" else config.dtype,
        "seed": seed,
        "max_num_seqs": config.max_num_seqs,
        "max_model_len": config.max_model_len,
        "enforce_eager": config.enforce_eager,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "load_format": "dummy",  # the trainer sends the weights
        "skip_tokenizer_init": True,
        "logprobs_mode": "processed_logprobs",  # at the sampling temperature
        "generation_config": "vllm",  # the model folder's sampling defaults must not leak in
    }
    if on_cpu:
        # a prefill cut in two rewinds the request's generator by an offset, which CPU generators do not have
        options["enable_chunked_prefill"] = False
        options["max_num_batched_tokens"] = max(CPU_BATCHED_TOKENS, config.max_model_len or 0, config.max_num_seqs)
        options["kv_cache_memory_bytes"] = (config.kv_cache_mb or CPU_KV_CACHE_MB) << 20
        return options
    if config.kv_cache_mb:
        options["kv_cache_memory_bytes"] = config.kv_cache_mb << 20
        # the cache does not follow from it then, but at its start vLLM still wants that share of the GPU to be free, and the
        # trainer may be there first
        options["gpu_memory_utilization"] = LEAST_SHARE
    if config.max_num_seqs > GPU_BATCHED_TOKENS:
        options["max_num_batched_tokens"] = config.max_num_seqs
    return options


def command_line(options: Mapping[str, Any]) -> list[str]:
    """The same options as flags of vLLM's server; None is left to vLLM."""
    flags: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def engine_environment() -> dict[str, str]:
    """This process's environment without what would make vLLM a rank of our job or change what it is told."""
    env = helper_environment()
    env.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override rollout.kv_cache_mb
    env["VLLM_NO_USAGE_STATS"] = "1"
    env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # its own choice puts every engine on the same cores
    return env


def worker_variables(rollout: RolloutConfig, local_engines: int, cores: int, gpus: Sequence[str]) -> dict[str, str]:
    """Environment variables of an engine process, beside those of `engine_environment`.

    Args:
        local_engines: engines that share this machine's cores.
        cores: that these may run on.
        gpus: the engine's devices, by their names for CUDA_VISIBLE_DEVICES; none on a CPU.
    """
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(rollout.threads or max(1, cores // local_engines)),
    }
    if gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    elif rollout.enforce_eager:
        variables["TORCHDYNAMO_DISABLE"] = "1"  # vLLM still compiles small sampling helpers, which costs seconds
    return variables
