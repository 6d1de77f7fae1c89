"""A bare `vllm.LLM` in a process of its own, for `bench_loop` to compare with: `python -m scripts.bench_vllm_alone TASK`."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from subprocess import DEVNULL, PIPE
from typing import Any

REPACKINGS = 5


class VLLMAlone:
    """Samples the same prompts again and again. `start_s` is the wall time from process start until it could, `repack_s` what
    its CPU kernels take to repack the weights of all layers.

    Args:
        engine: keyword arguments of `vllm.LLM`.
        sampling: those of `vllm.SamplingParams`, `n` among them.
    """

    def __init__(
        self, engine: dict[str, Any], sampling: dict[str, Any], prompts: list[list[int]], threads: int
    ) -> None:
        task = json.dumps({"engine": engine, "sampling": sampling, "prompts": prompts})
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
        environment["OMP_NUM_THREADS"] = str(threads)
        command = [sys.executable, "-m", "scripts.bench_vllm_alone", task]
        started = time.perf_counter()
        self._process = subprocess.Popen(command, env=environment, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True)
        self.repack_s = self._answer()["repack_s"]
        self.start_s = time.perf_counter() - started - REPACKINGS * self.repack_s

    def generate(self) -> dict[str, float]:
        """Sampled tokens per second: `plain`, and `same` with the log-probabilities and seeds that training needs."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # vLLM prints there too
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError("vLLM alone has ended")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def serve(task: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(**task["engine"], skip_tokenizer_init=True, disable_log_stats=True)
    prompts = [{"prompt_token_ids": p} for p in task["prompts"]]
    shared = {**task["sampling"], "temperature": 1.0, "detokenize": False, "ignore_eos": True}
    seeds = range(0, len(prompts) * shared["n"], shared["n"])
    kinds = {
        "plain": [SamplingParams(**shared) for _ in prompts],
        "same": [SamplingParams(**shared, logprobs=0, flat_logprobs=True, seed=seed) for seed in seeds],
    }
    (repack_s,) = llm.apply_model(repack_seconds)
    print(json.dumps({"repack_s": repack_s}), flush=True)
    for _ in sys.stdin:
        rates = {}
        for kind, params in kinds.items():
            begun = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            sampled = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
            rates[kind] = sampled / (time.perf_counter() - begun)
        print(json.dumps(rates), flush=True)


def repack_seconds(model: Any) -> float:
    """Median of REPACKINGS, of weights of the same shapes: vLLM lets go of those that it has repacked. Zero on a GPU.

    Memory that the last one gave back is kept for the next: fetched page by page, it would take half as long again.
    """
    import torch
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    from megatron_reheat.parallel.cpu import keep_memory

    keep_memory()
    shapes, layers = [], [m for m in model.modules() if hasattr(m, "cpu_linear")]
    for layer in layers:
        linear = hasattr(layer, "output_size_per_partition")
        shape = (layer.output_size_per_partition, layer.input_size_per_partition) if linear else layer.weight.shape
        shapes.append((shape, next(layer.parameters()).dtype))
    taken = []
    for _ in range(REPACKINGS):
        stand_ins = [torch.nn.Module() for _ in shapes]
        for stand_in, (shape, dtype) in zip(stand_ins, shapes, strict=True):
            stand_in.weight = torch.nn.Parameter(torch.ones(shape, dtype=dtype), requires_grad=False)
        begun = time.perf_counter()
        for stand_in in stand_ins:
            dispatch_cpu_unquantized_gemm(stand_in, remove_weight=True)
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
