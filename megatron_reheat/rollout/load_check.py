"""Whether vLLM itself loads a model folder, and what it samples from it greedily; in a child process, on any device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_reheat.errors import ReheatError
from megatron_reheat.rollout.engine_options import engine_environment
from megatron_reheat.rollout.module_process import with_package

LOG_TAIL_CHARS = 1500
KV_CACHE_BYTES = 64 << 20


def sample_greedily(
    folder: Path,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    visible_devices: str | None = None,
    timeout_s: float = 900.0,
) -> list[tuple[list[int], list[float]]]:
    """(token ids, their log-probabilities) of each prompt's greedy continuation in float32, by a fresh vLLM.

    Args:
        visible_devices: CUDA_VISIBLE_DEVICES of the child; None leaves it unset.

    Raises:
        ReheatError: vLLM refused the folder, failed or took too long; the message ends with what it printed.
    """
    environment = with_package(engine_environment())
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    if visible_devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible_devices
    environment |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TORCHDYNAMO_DISABLE": "1",
    }
    with tempfile.TemporaryDirectory() as scratch:
        request, answer, log = (Path(scratch) / name for name in ("request.json", "answer.json", "log"))
        request.write_text(json.dumps({"folder": str(folder), "prompts": list(prompts), "num_tokens": num_tokens}))
        with log.open("wb") as output:
            try:
                code: int | str = subprocess.run(
                    [sys.executable, "-m", __name__, str(request), str(answer)],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=timeout_s,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                code = f"no answer after {timeout_s:g} s"
        if code or not answer.is_file():
            tail = log.read_text(errors="replace")[-LOG_TAIL_CHARS:]
            raise ReheatError(f"vLLM did not load {folder} ({code}); it printed:\n{tail}")
        return [(tokens, logprobs) for tokens, logprobs in json.loads(answer.read_text())]


def _main() -> None:
    request, answer = map(Path, sys.argv[1:])
    asked = json.loads(request.read_text())
    from vllm import LLM, SamplingParams

    model = LLM(
        asked["folder"],
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=max(map(len, asked["prompts"])) + asked["num_tokens"],
        max_num_seqs=len(asked["prompts"]),
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        generation_config="vllm",
    )
    params = SamplingParams(
        temperature=0.0, max_tokens=asked["num_tokens"], ignore_eos=True, logprobs=0, detokenize=False
    )
    outputs = model.generate([{"prompt_token_ids": p} for p in asked["prompts"]], params, use_tqdm=False)
    completions = [output.outputs[0] for output in outputs]
    answer.write_text(
        json.dumps(
            [
                (list(c.token_ids), [at[token].logprob for at, token in zip(c.logprobs, c.token_ids, strict=True)])
                for c in completions
            ]
        )
    )


if __name__ == "__main__":
    _main()
    os._exit(0)  # vLLM's threads need no unwinding
