"""One vLLM engine in a child process of a trainer rank: beside each replica (`embedded`) or on every GPU (`colocated`).

The trainer never imports vLLM, which would join its process groups and reseed its generators. Weights cross in shared
memory: the host's for an engine on the CPU, the GPU's own for one on a GPU.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_reheat.config import RolloutConfig
from megatron_reheat.errors import EngineDied, WeightSyncError
from megatron_reheat.rollout.checks import check_params, check_prompts
from megatron_reheat.rollout.child_process import ChildProcess
from megatron_reheat.rollout.engine_options import engine_environment, engine_options, worker_variables
from megatron_reheat.rollout.gpus import visible_gpus
from megatron_reheat.rollout.head_start import WORKER_MODULE, HeadStart
from megatron_reheat.rollout.packed import Entry, aligned
from megatron_reheat.rollout.rollout_engine import OnFinished, SyncReport
from megatron_reheat.rollout.weight_buffer import DeviceBuffer, HostBuffer, SendBuffer
from megatron_reheat.rollout.wire import SampleReply, SampleRequest, WorkerReady, WorkerSettings
from megatron_reheat.types import Completion, SamplingParams

WEIGHT_RECEIVER = "megatron_reheat.rollout.weight_receiver.WeightReceiver"
# the engine loads one portion while the trainer gathers the next
PORTION_BYTES = 32 << 20


class EmbeddedEngine:
    """A `RolloutEngine` in a child process. The constructor returns at once; `wait_ready` or the first use waits.

    Make it in the main thread: the child is killed when the thread that started it ends.

    Args:
        model_path: Hugging Face folder (or hub name); only its config.json is read, weights come by `update_weights`.
        dtype: the engine's dtype when `config.dtype` is auto.
        log_file: receives everything the child prints; appended to.
        seed: vLLM's own seed (dummy weights); samples depend on the seed given to `generate` alone.
        local_engines: engines that share this machine's cores, for the default number of threads.
        gpus: indices of the GPUs to use (`config.tensor` of them) as this process counts them; empty on CPU.
        cpu_affinity: cores the child may run on; None leaves it to the scheduler.
        frozen: the weights never change: they come through host memory, and stay there while the engine sleeps.
        start: False leaves the start to the first use, for devices that something else has to leave first.
        head_start: may have processes that import vLLM already.
    """

    _child: ChildProcess | None = None
    _ready: WorkerReady | None
    _started_at: float

    def __init__(
        self,
        model_path: str,
        config: RolloutConfig,
        *,
        dtype: str,
        log_file: Path,
        seed: int = 0,
        local_engines: int = 1,
        gpus: Sequence[int] = (),
        cpu_affinity: Sequence[int] | None = None,
        frozen: bool = False,
        start: bool = True,
        head_start: HeadStart | None = None,
    ) -> None:
        self._config = config
        self._model_path = model_path
        self._dtype = dtype
        self._log_file = log_file
        self._seed = seed
        self._gpus = tuple(gpus)
        self._cores = tuple(cpu_affinity or ())
        self._local_engines = local_engines
        self._head_start = head_start
        self._frozen = frozen
        self._ready = None
        self._restarts = 0
        self._asleep = False
        self._closed = False
        self._policy_version: int | None = None
        capacity = config.sync_bucket_mb << 20
        on_device = self._gpus and not frozen  # a buffer on the GPU would lie there for one transfer
        self._buffer: SendBuffer = DeviceBuffer(capacity, self._gpus[0]) if on_device else HostBuffer(capacity)
        if start:
            self._start()

    @property
    def policy_version(self) -> int | None:
        return self._policy_version

    def wait_ready(self) -> float:
        """Waits until the child can serve; returns the seconds from its start until it could.

        Raises:
            EngineDied: when it ended, or was not ready within `rollout.start_timeout_s` of its start.
        """
        if self._ready is None:
            if self._closed:
                raise EngineDied("the rollout engine is closed")
            child = self._child or self._start()
            left = max(0.0, self._started_at + self._config.start_timeout_s - time.monotonic())
            self._ready = child.receive(0, "start", timeout_s=left, timeout_key="rollout.start_timeout_s")
        return self._ready.at - self._started_at

    def restart(self) -> None:
        """Replaces the child, dead or alive; the new one needs weights before it samples.

        Raises:
            EngineDied: after `rollout.max_restarts` restarts.
        """
        if self._restarts >= self._config.max_restarts:
            raise EngineDied(
                f"the rollout engine was restarted {self._restarts} times (rollout.max_restarts); see {self._log_file}"
            )
        if self._child is not None:
            self._child.end()
        self._restarts += 1
        self._start()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        n: int,
        seed: int,
        on_finished: OnFinished | None = None,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`. The same weights, prompts, seed and n give the same completions; sample i of
        prompt p draws from a stream of its own, however vLLM batches the requests.
        """
        self.wait_ready()
        assert self._ready is not None
        if not prompts:
            return []
        if self._asleep:
            raise WeightSyncError("the rollout engine is asleep; call wake() before generate()")
        check_params(params, n, self._ready.vocab_size)
        checked = check_prompts(prompts, self._ready.max_model_len, self._ready.vocab_size)
        request = SampleRequest.pack(checked, params, n, seed, apart=on_finished is not None)
        sampled: dict[int, Completion] = {}

        def take(reply: SampleReply) -> None:
            for place, completion in reply.unpack(params.temperature):
                sampled[place] = completion
                if on_finished is not None:
                    on_finished(*divmod(place, n), completion)

        rest = self._call("generate", request, take=take)
        if rest is not None:
            take(rest)
        return [[sampled[p * n + i] for i in range(n)] for p in range(len(prompts))]

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int, verify: bool) -> SyncReport:
        self._policy_version = None
        tensors = iter(tensors)
        try:
            self.wait_ready()
            started = time.perf_counter()
            self._call("begin", self._buffer.source)
            self._stream(tensors, verify)
            num_tensors, num_bytes = self._call("commit", version)
        except (EngineDied, WeightSyncError):
            for _ in tensors:  # other ranks are inside the same collectives
                pass
            raise
        self._policy_version = version
        return SyncReport(version, num_tensors, num_bytes, time.perf_counter() - started, verify)

    def sleep(self) -> None:
        """On a GPU weights and KV cache are dropped, so a weight sync must follow `wake`; a frozen model's weights go to the
        host instead and come back. On CPU nothing is freed."""
        self.wait_ready()
        if not self._asleep:
            self._call("sleep", self._frozen)
            self._asleep = True
            self._policy_version = self._call("version")

    def wake(self) -> None:
        self.wait_ready()
        if self._asleep:
            self._call("wake", self._frozen)
            self._asleep = False

    def close(self) -> None:
        self._closed = True
        self._ready = None
        self._policy_version = None
        if self._child is not None:
            self._child.end()
        self._buffer.close()

    def _start(self) -> ChildProcess:
        self._ready = None
        self._asleep = False
        self._policy_version = None
        self._started_at = time.monotonic()  # of this boot, so that parent and child read the same
        arguments = [",".join(map(str, self._cores))] if self._cores else []
        variables = self._variables()
        child = None
        if self._head_start is not None:
            child = self._head_start.take(arguments, variables, self._log_file)
        if child is None:
            env = engine_environment() | variables
            child = ChildProcess(WORKER_MODULE, arguments, env=env, log_file=self._log_file)
        self._child = child
        options = engine_options(
            self._config, self._model_path, dtype=self._dtype, seed=self._seed, on_cpu=not self._gpus
        )
        options["disable_log_stats"] = True
        options["worker_extension_cls"] = WEIGHT_RECEIVER
        if self._gpus:
            options["enable_sleep_mode"] = True
        child.send_settings(WorkerSettings(options, str(self._log_file.resolve())), self._config.start_timeout_s)
        return child

    def _variables(self) -> dict[str, str]:
        names = visible_gpus() if self._gpus else ()
        if self._cores:
            return worker_variables(self._config, 1, len(self._cores), [names[gpu] for gpu in self._gpus])
        cores = len(os.sched_getaffinity(0))
        return worker_variables(self._config, self._local_engines, cores, [names[gpu] for gpu in self._gpus])

    def _call(self, operation: str, *arguments: Any, take: Callable[[Any], None] | None = None) -> Any:
        assert self._child is not None
        try:
            return self._child.call(
                operation, *arguments, timeout_s=self._config.timeout_s, timeout_key="rollout.timeout_s", take=take
            )
        except EngineDied:
            self._policy_version = None
            raise

    def _stream(self, tensors: Iterable[tuple[str, torch.Tensor]], verify: bool) -> None:
        """Packs tensors into the buffer and announces them portion by portion; waits only when the buffer is full."""
        offset = 0
        portion: list[Entry] = []
        portion_start = 0
        for name, tensor in tensors:
            if portion and offset + tensor.nbytes > self._buffer.capacity:
                self._announce(portion)
                portion = []
            if offset + tensor.nbytes > self._buffer.capacity:
                if tensor.nbytes > self._buffer.capacity:
                    self._buffer.grow(aligned(tensor.nbytes))
                self._call("recycle", self._buffer.source)
                offset = portion_start = 0
            portion.append(self._buffer.write(name, tensor, offset, verify))
            offset += aligned(tensor.nbytes)
            if offset - portion_start >= PORTION_BYTES:
                self._announce(portion)
                portion, portion_start = [], offset
            del tensor  # what comes behind the last one counts on its memory
        if portion:
            self._announce(portion)

    def _announce(self, portion: list[Entry]) -> None:
        assert self._child is not None
        self._buffer.flush()
        self._child.send("load", portion, timeout_s=self._config.timeout_s)
