"""vLLM inside the engine process: builds the engine, samples, and answers the trainer's operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import vllm
from vllm import EngineArgs, LLMEngine
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from megatron_reheat.errors import ReheatError, WeightSyncError
from megatron_reheat.rollout.packed import Entry
from megatron_reheat.rollout.weight_buffer import Source
from megatron_reheat.rollout.wire import SampleReply, SampleRequest, WorkerSettings


class VLLMSampler:
    """One vLLM engine with dummy weights until the first sync."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._on_cpu = current_platform.is_cpu()
        self._engine = LLMEngine.from_engine_args(EngineArgs(**settings.options))
        model_config = self._engine.model_config
        if self._on_cpu:
            _check_head_size(model_config)
        self.vocab_size = model_config.get_vocab_size()
        self.max_model_len = model_config.max_model_len
        self._version: int | None = None
        self._kv_cache_dropped = False
        self.operations: dict[str, Callable[..., Any]] = {
            "generate": self.generate,
            "begin": self._begin,
            "load": self._load,
            "recycle": self._recycle,
            "commit": self._commit,
            "sleep": self._sleep,
            "wake": self._wake,
            "version": lambda: self._version,
        }

    def generate(self, request: SampleRequest, send: Callable[[SampleReply], None]) -> SampleReply | None:
        """Samples every prompt `n` times. What is asked for `apart` goes to `send` after the step in which it is finished, and
        is not returned.

        Raises:
            WeightSyncError: before the first sync and after a failed one.
        """
        if self._version is None:
            raise WeightSyncError("the engine holds no complete weights; sync weights before sampling")
        finished: dict[int, Any] = {}
        try:
            for index, prompt in enumerate(request.prompts()):
                for place in range(index * request.n, (index + 1) * request.n, request.samples):
                    params = _sampling_params(request, place)
                    self._engine.add_request(str(place), {"prompt_token_ids": prompt}, params)
            while self._engine.has_unfinished_requests():
                now = {int(output.request_id): output.outputs for output in self._engine.step() if output.finished}
                if request.apart and now:
                    send(_pack_reply(now, self._version))
                else:
                    finished |= now
        except BaseException:
            self._abort_all()
            raise
        return None if request.apart else _pack_reply(finished, self._version)

    def _abort_all(self) -> None:
        # a request that failed inside a step stays queued, and the next call would wait for it for ever
        queued = list(self._engine.output_processor.request_states)
        self._engine.abort_request(queued, internal=True)

    def _begin(self, source: Source) -> None:
        """Starts a sync through a buffer; from here on nothing is sampled until `commit`."""
        self._version = None
        self._engine.collective_rpc("reheat_begin", args=(source,))

    def _load(self, entries: Sequence[Entry]) -> None:
        self._engine.collective_rpc("reheat_load", args=(entries,))

    def _recycle(self, source: Source) -> None:
        """The sender is about to overwrite the buffer, or to go on in another one."""
        self._engine.collective_rpc("reheat_recycle", args=(source,))

    def _commit(self, version: int) -> tuple[int, int]:
        received, *_ = results = self._engine.collective_rpc("reheat_commit")
        for problem in results:
            if isinstance(problem, str):
                raise WeightSyncError(problem)
        if self._kv_cache_dropped:
            self._engine.wake_up(tags=["kv_cache"])
            self._kv_cache_dropped = False
        if not self._engine.reset_prefix_cache():
            raise WeightSyncError("the engine could not drop its prefix cache because requests are still running")
        self._version = version
        return received

    def _sleep(self, keep_weights: bool) -> None:
        """Level 2 drops weights and KV cache, level 1 keeps the weights on the host; vLLM on CPU has no memory to give back."""
        if self._on_cpu:
            return
        if keep_weights and self._version is not None:
            self._engine.sleep(level=1)
            return
        self._version = None
        self._engine.sleep(level=2)
        self._kv_cache_dropped = True

    def _wake(self, keep_weights: bool) -> None:
        """The memory of weights that are still to come, alone: that of the KV cache follows when they are there."""
        if self._on_cpu:
            return
        if keep_weights and self._version is not None:
            self._engine.wake_up()
            self._engine.reset_prefix_cache()  # it was in the KV cache that was dropped
            return
        self._engine.wake_up(tags=["weights"])


def _check_head_size(model_config: Any) -> None:
    """vLLM itself would start, and fail at the first request without naming the cause."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    head_size, supported = model_config.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    if head_size not in supported:
        raise ReheatError(
            f"the model's head_dim is {head_size}, but vLLM's CPU attention has kernels for {supported} only; "
            "use another model, or a GPU"
        )


def _sampling_params(request: SampleRequest, place: int) -> vllm.SamplingParams:
    return vllm.SamplingParams(
        n=request.samples,
        seed=request.seed_of(place),
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


def _pack_reply(finished: Mapping[int, Any], version: int) -> SampleReply:
    """`finished` are vLLM's outputs of requests, by the place of their first completion."""
    places: list[int] = []
    token_ids: list[int] = []
    logprobs: list[float] = []
    lengths: list[int] = []
    stopped: list[bool] = []
    for first, outputs in finished.items():
        for place, output in enumerate(outputs, start=first):
            if output.finish_reason not in ("stop", "length") or len(output.logprobs.logprobs) != len(output.token_ids):
                raise ReheatError(f"vLLM ended a request with finish_reason {output.finish_reason!r}")
            places.append(place)
            token_ids += output.token_ids
            logprobs += output.logprobs.logprobs
            lengths.append(len(output.token_ids))
            stopped.append(output.finish_reason == "stop")
    return SampleReply(
        places=np.asarray(places, dtype=np.int32),
        token_ids=np.asarray(token_ids, dtype=np.int32),
        logprobs=np.asarray(logprobs, dtype=np.float32),
        lengths=np.asarray(lengths, dtype=np.int32),
        stopped=np.asarray(stopped, dtype=np.bool_),
        policy_version=version,
    )
