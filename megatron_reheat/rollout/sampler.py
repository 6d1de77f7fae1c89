"""vLLM inside the engine process: builds the engine, samples, and answers the trainer's operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import vllm
from vllm import EngineArgs, LLMEngine
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from megatron_reheat.errors import ReheatError, WeightSyncError
from megatron_reheat.rollout.reload import WeightLoader
from megatron_reheat.rollout.shared_memory import SharedBuffer
from megatron_reheat.rollout.wire import SampleReply, SampleRequest, WorkerSettings

CPU_BATCHED_TOKENS = 8192
CPU_KV_CACHE_MB = 1024


class Sampler:
    """One vLLM engine with dummy weights until the first sync."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._on_cpu = current_platform.is_cpu()
        self._engine = LLMEngine.from_engine_args(_engine_args(settings, self._on_cpu))
        model_config = self._engine.model_config
        if self._on_cpu:
            _check_head_size(model_config)
        self.vocab_size = model_config.get_vocab_size()
        self.max_model_len = model_config.max_model_len
        buffer = SharedBuffer(settings.buffer_fd, settings.buffer_capacity)
        self._loader = WeightLoader(self._engine, settings.model_path, buffer)
        self.operations: dict[str, Callable[..., Any]] = {
            "generate": self.generate,
            "begin": self._loader.begin,
            "load": self._loader.load,
            "recycle": self._loader.recycle,
            "commit": self._loader.commit,
            "sleep": self._sleep,
            "wake": self._wake,
            "version": lambda: self._loader.version,
        }

    def generate(self, request: SampleRequest) -> SampleReply:
        """Samples every prompt `n` times.

        Raises:
            WeightSyncError: before the first sync and after a failed one.
        """
        if self._loader.version is None:
            raise WeightSyncError("the engine holds no complete weights; sync weights before sampling")
        prompts = request.prompts()
        try:
            for index, prompt in enumerate(prompts):
                params = _sampling_params(request, index)
                self._engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
            finished: list[Any] = [None] * len(prompts)
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    if output.finished:
                        finished[int(output.request_id)] = output.outputs
        except BaseException:
            self._abort_all()
            raise
        return _pack_reply(finished, self._loader.version)

    def _abort_all(self) -> None:
        # a request that failed inside a step stays queued, and the next call would wait for it for ever
        queued = list(self._engine.output_processor.request_states)
        self._engine.abort_request(queued, internal=True)

    def _sleep(self) -> None:
        """Level 2 drops weights and KV cache; vLLM on CPU has no memory to give back."""
        if not self._on_cpu:
            self._loader.version = None
            self._engine.sleep(level=2)

    def _wake(self) -> None:
        if not self._on_cpu:
            self._engine.wake_up()


def _engine_args(settings: WorkerSettings, on_cpu: bool) -> EngineArgs:
    options: dict[str, Any] = {
        "model": settings.model_path,
        "dtype": settings.dtype,
        "seed": settings.seed,
        "max_num_seqs": settings.max_num_seqs,
        "max_model_len": settings.max_model_len,
        "enforce_eager": settings.enforce_eager,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "load_format": "dummy",  # the trainer sends the weights
        "skip_tokenizer_init": True,
        "logprobs_mode": "processed_logprobs",  # at the sampling temperature
        "generation_config": "vllm",  # the model folder's sampling defaults must not leak in
        "disable_log_stats": True,
    }
    if on_cpu:
        # a prefill cut in two rewinds the request's generator by an offset, which CPU generators do not have
        options["enable_chunked_prefill"] = False
        options["max_num_batched_tokens"] = max(CPU_BATCHED_TOKENS, settings.max_model_len or 0, settings.max_num_seqs)
        options["kv_cache_memory_bytes"] = (settings.kv_cache_mb or CPU_KV_CACHE_MB) << 20
    else:
        options["enable_sleep_mode"] = True
        if settings.kv_cache_mb:
            options["kv_cache_memory_bytes"] = settings.kv_cache_mb << 20
    return EngineArgs(**options)


def _check_head_size(model_config: Any) -> None:
    """vLLM itself would start, and fail at the first request without naming the cause."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    head_size, supported = model_config.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    if head_size not in supported:
        raise ReheatError(
            f"the model's head_dim is {head_size}, but vLLM's CPU attention has kernels for {supported} only; "
            "use another model, or a GPU"
        )


def _sampling_params(request: SampleRequest, index: int) -> vllm.SamplingParams:
    return vllm.SamplingParams(
        n=request.n,
        # vLLM gives sample i the seed + i, so prompts are n apart
        seed=None if request.temperature == 0 else request.base_seed + index * request.n,
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=request.max_tokens,
        stop_token_ids=list(request.stop_token_ids),
        ignore_eos=True,  # stop_token_ids alone decides
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _pack_reply(finished: list[Any], version: int) -> SampleReply:
    token_ids: list[int] = []
    logprobs: list[float] = []
    lengths: list[int] = []
    stopped: list[bool] = []
    for outputs in finished:
        for output in outputs:
            if output.finish_reason not in ("stop", "length") or len(output.logprobs.logprobs) != len(output.token_ids):
                raise ReheatError(f"vLLM ended a request with finish_reason {output.finish_reason!r}")
            token_ids += output.token_ids
            logprobs += output.logprobs.logprobs
            lengths.append(len(output.token_ids))
            stopped.append(output.finish_reason == "stop")
    return SampleReply(
        token_ids=np.asarray(token_ids, dtype=np.int32),
        logprobs=np.asarray(logprobs, dtype=np.float32),
        lengths=np.asarray(lengths, dtype=np.int32),
        stopped=np.asarray(stopped, dtype=np.bool_),
        policy_version=version,
    )
