"""The analytic model against what others have published: each row repeats a published set-up and prints both numbers.

The `FITTED` constants follow from the rows of `calibration` alone (`python -m scripts.estimate_accuracy --fit`); no other row
has set a constant. Left out is what the model has no terms for (mixtures of experts, LoRA, FP8) and steps of unknown batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_reheat.cluster.estimate import Estimate
from megatron_reheat.cluster.gpus import GPUS, Constants, Gpu
from megatron_reheat.cluster.workload import Lengths
from megatron_reheat.model.architecture import LLAMA_31_8B, QWEN3, Architecture
from megatron_reheat.recipe import parse_config

FITTED = ("matmul_flops", "attention_flops", "layer_launch_s", "step_s")
_NO_FILTER = {"dynamic_sampling": False}
# A hybrid of Mamba and attention; here a dense model of its width, vocabulary and FLOPs (20.6e9 for a token of 4,096 in
# training: 402.5 TFLOP/s over 19,581 tokens/s), two of its 42 layers in one, with as much attention.
_NEMOTRON_4B = Architecture(3136, 13_450, 21, 8, 8, 128, 131_072, False, 262_144, qk_norm=False)


@dataclass(frozen=True)
class Comparison:
    """`published` and `modeled` in `unit`; `assumed` says what the published number leaves open or does otherwise."""

    what: str
    unit: str
    published: float
    modeled: float
    calibration: bool = False
    assumed: str = ""

    @property
    def ratio(self) -> float:
        """Modeled over published."""
        return self.modeled / self.published

    @property
    def off(self) -> float:
        """The ratio's distance from 1 as a factor, 1 or more."""
        return max(self.ratio, 1 / self.ratio)


def comparisons(mean_tokens: float, constants: Constants | None = None) -> list[Comparison]:
    """
    Args:
        mean_tokens: stands in where a paper does not give its mean response length (cap 8192).
        constants: of all GPUs, in place of their own.
    """
    gpus = {name: gpu if constants is None else replace(gpu, constants=constants) for name, gpu in GPUS.items()}
    return [*calibration(gpus), *_trainers(gpus), *_steps(gpus, mean_tokens), *_syncs(gpus), _demo()]


def calibration(gpus: dict[str, Gpu]) -> Iterator[Comparison]:
    """The rows that `FITTED` is fitted to.

    Sources, here and for other trainers: prime-rl's `benchmarks/baselines` of January 2026 (`step_time`; `throughput` spans
    from step to step, which the weights' way to a disk is part of) and Megatron-Bridge's
    `examples/model_verification_cards` of July 2026.
    """
    small, smallest = QWEN3["Qwen3-4B"], QWEN3["Qwen3-0.6B"]
    for name, model, count, length, seconds in (
        ("Qwen3-4B, 8 x H100", small, 8, 16_384, 4.69),
        ("Qwen3-4B, 8 x H100", small, 8, 65_536, 30.29),
        ("Qwen3-0.6B, 1 x H100", smallest, 1, 16_384, 1.99),
        ("Qwen3-0.6B, 1 x H100", smallest, 1, 65_536, 12.18),
    ):
        update = _Update(model, gpus["h100-80g"], count, length, sequences=2)
        yield Comparison(f"prime-rl: RL update, {name}, 2 x {length:,} tokens", "s", seconds, update.step_s, True)
    large = QWEN3["Qwen3-8B"]
    launched = _Update(large, gpus["h100-80g"], 4, 2048, sequences=32, tensor=4, recompute="none", own_step=False)
    what = "Megatron-Bridge: SFT, Qwen3-8B, 4 x H100, TP4, 32 x 2,048 tokens"
    yield Comparison(what, "tok/s/GPU", 2207.0, launched.tokens_per_s, True)


def _trainers(gpus: dict[str, Gpu]) -> Iterator[Comparison]:
    small, large, smallest = QWEN3["Qwen3-4B"], QWEN3["Qwen3-8B"], QWEN3["Qwen3-0.6B"]
    for length, seconds in ((16_384, 4.42), (65_536, 29.89)):
        update = _Update(small, gpus["h200-141g"], 8, length, sequences=2)
        yield Comparison(f"prime-rl: RL update, Qwen3-4B, 8 x H200, 2 x {length:,} tokens", "s", seconds, update.step_s)
    for length, rate in ((16_384, 3253.0), (65_536, 3621.0)):
        update = _Update(small, gpus["h100-80g"], 8, length, sequences=2)
        written = 2 * small.num_parameters / update.estimate.gpu.constants.storage_bytes_s
        what = f"prime-rl: RL update and weights to disk, Qwen3-4B, 8 x H100, 2 x {length:,} tokens"
        modeled = 2 * length / (update.step_s + written)
        yield Comparison(what, "tok/s/GPU", rate, modeled, assumed="1 GB/s to disk")
    for name, model, count, length, seconds, assumed in (
        ("Qwen3-4B, 8 x H100", small, 8, 16_384, 5.01, "theirs: FlashAttention-2"),
        ("Qwen3-0.6B, 1 x H100", smallest, 1, 16_384, 1.28, ""),
        ("Qwen3-0.6B, 1 x H100", smallest, 1, 8192, 0.62, ""),
    ):
        update = _Update(model, gpus["h100-80g"], count, length, sequences=2, fused_head=False, own_step=False)
        yield Comparison(f"prime-rl: SFT, {name}, 2 x {length:,} tokens", "s", seconds, update.step_s, False, assumed)
    pretraining = "Megatron-Bridge: pretraining, Qwen3-8B, TP1, 64 x 4,096 tokens"
    for count, gpu, rate, assumed in (
        (16, "h100-80g", 10_488.0, ""),
        (16, "h200-141g", 10_125.0, "set-up unknown: the H100s'"),
    ):
        update = _Update(large, gpus[gpu], count, 4096, sequences=64, recompute="none", own_step=False)
        what = f"{pretraining}, {count} x {gpu[:4].upper()}"
        yield Comparison(what, "tok/s/GPU", rate, update.tokens_per_s, assumed=assumed)
    update = _Update(large, gpus["h100-80g"], 4, 8192, sequences=8, tensor=4, recompute="none", own_step=False)
    what = "Megatron-Bridge: SFT, Qwen3-8B, 4 x H100, TP4, 8 x 8,192 tokens"
    yield Comparison(what, "tok/s/GPU", 8083.0, update.tokens_per_s)
    for what, length, sequences, rate in (("pretraining", 4096, 128, 19_581.0), ("SFT", 2048, 4, 13_065.0)):
        update = _Update(
            _NEMOTRON_4B, gpus["h100-80g"], 8, length, sequences=sequences, recompute="none", own_step=False
        )
        what = f"Megatron-Bridge: {what}, Nemotron-3-Nano-4B, 8 x H100, {sequences} x {length:,} tokens"
        yield Comparison(what, "tok/s/GPU", rate, update.tokens_per_s, assumed="as dense, of the same FLOPs")


def _steps(gpus: dict[str, Gpu], mean_tokens: float) -> Iterator[Comparison]:
    h100, small, large = gpus["h100-80g"], QWEN3["Qwen3-4B"], QWEN3["Qwen3-8B"]
    what = "vLLM 0.30: Qwen3-8B, 1 x H100, 128 tokens in, 1,024 out, 396 at a time"
    sampled = _sampled_tokens_per_s(large, h100, requests=396, prompt=128, response=1024)
    yield Comparison(what, "tok/s", 13_322.0, sampled)
    for mean, seconds in ((1019, 92.8), (1060, 97.7)):
        nemo = _estimate(
            LLAMA_31_8B,
            h100,
            16,
            mean_tokens=mean,
            prompt_tokens=130.0,
            model={"recompute": "none"},
            parallel={"pipeline": 2, "microbatch_tokens": 5120},
            rollout={"mode": "colocated", "max_tokens": 4096, "gpu_memory_utilization": 0.6},
            rl={"prompts_per_step": 64, "group_size": 32, "minibatch_prompts": 16, "dynamic_sampling": False},
        )
        what = f"NeMo-RL: GRPO on-policy, Llama-3.1-8B, 16 x H100, PP2, mean {mean:,} tokens"
        assumed = "prompts of 130 by its tok/s; 4,096-token limit on the response alone"
        yield Comparison(what, "s/step", seconds, sum(nemo.rl_step().values()), assumed=assumed)
    for name, model, rl_s, reheat_s, layout in (
        ("Qwen3-4B", small, 200.0, 1035.0, {}),
        ("Qwen3-8B", large, 240.0, 1370.0, {"tensor": 2, "sequence_parallel": True}),
    ):
        paper = _estimate(model, h100, 8, mean_tokens, parallel=layout, rollout={"max_tokens": 8192}, rl=_NO_FILTER)
        unknown = f"mean length unknown: {mean_tokens:.0f}; layout ours; dynamic sampling off"
        set_up = f"TS-OPSD paper: {name}, 8 x H800"
        yield Comparison(f"{set_up}, DAPO", "s/step", rl_s, sum(paper.rl_step().values()), assumed=unknown)
        reheating = sum(paper.reheat_step().values())
        yield Comparison(f"{set_up}, reheating", "s/step", reheat_s, reheating, assumed=unknown)


def _syncs(gpus: dict[str, Gpu]) -> Iterator[Comparison]:
    for what, model, seconds, assumed in (
        ("NeMo-RL: Qwen3-4B, 8 x H100", QWEN3["Qwen3-4B"], 0.28, "0.21 to 0.34; theirs: resharded into place"),
        ("TRL, vLLM's own API: Qwen3-0.6B, H100", QWEN3["Qwen3-0.6B"], 0.18, "about 0.18"),
    ):
        servers = {"max_tokens": 8192, "mode": "server", "num_servers": 1, "tensor": 1}
        sync = _estimate(model, gpus["h100-80g"], 8, 2048, rollout=servers).sync_seconds()
        yield Comparison(f"weight sync to servers, {what}", "s", seconds, sync, assumed=assumed)


def _demo() -> Comparison:
    """examples/countdown_cpu on two cores of an Intel Xeon, its RL step: `scripts.bench_loop`'s median of 30."""
    model = Architecture(96, 288, 3, 4, 2, 32, 22, True, 64)
    demo = _estimate(
        model,
        GPUS["cpu"],
        2,
        mean_tokens=6.4,
        prompt_tokens=8.5,
        model={"dtype": "float32"},
        parallel={"microbatch_tokens": 8192},
        data={"max_prompt_tokens": 12},
        rollout={"max_tokens": 16, "kv_cache_mb": 64},
        rl=_NO_FILTER,
        reheat={"max_tokens": 16},
    )
    step = sum(demo.rl_step().values())
    return Comparison(
        "this project's demo, 0.36M parameters, 2 CPU cores", "s/step", 0.84, step, False, "0.02 of it grading"
    )


def _estimate(
    architecture: Architecture,
    gpu: Gpu,
    num_gpus: int,
    mean_tokens: float,
    *,
    prompt_tokens: float = 256.0,
    **sections: dict[str, Any],
) -> Estimate:
    sections["model"] = {"hf_path": "-", "recompute": "full", **sections.get("model", {})}
    sections["data"] = {"path": "-", "max_prompt_tokens": 1024, **sections.get("data", {})}
    return Estimate(parse_config(sections), architecture, gpu, num_gpus, mean_tokens, prompt_tokens)


class _Update:
    """Forward, backward and optimizer, `sequences` full-length sequences a replica and step, one a micro-batch."""

    def __init__(
        self,
        architecture: Architecture,
        gpu: Gpu,
        num_gpus: int,
        length: int,
        *,
        sequences: int,
        tensor: int = 1,
        recompute: str = "full",
        fused_head: bool = True,
        own_step: bool = True,
    ) -> None:
        self.estimate = _estimate(
            architecture,
            gpu,
            num_gpus,
            mean_tokens=1.0,
            model={"fused_head": fused_head, "recompute": recompute},
            data={"max_prompt_tokens": 1},
            rollout={"max_tokens": 2},
            reheat={"max_tokens": 2},
            parallel={"microbatch_tokens": length, "tensor": tensor},
        )
        self._batch = replace(
            self.estimate.rl_batch,
            prompts=num_gpus // tensor * sequences,
            group_size=1,
            lengths=_always(length),
            prompt_tokens=0.0,
        )
        self._other = gpu.constants.step_s if own_step else 0.0

    @property
    def step_s(self) -> float:
        passes = self.estimate.pass_seconds(self._batch, training=True)
        return passes + self.estimate.optimizer_seconds() + self._other

    @property
    def tokens_per_s(self) -> float:
        """For each GPU."""
        return self._batch.tokens / self.estimate.num_gpus / self.step_s


def _sampled_tokens_per_s(architecture: Architecture, gpu: Gpu, *, requests: int, prompt: int, response: int) -> float:
    """Of one engine on one GPU that is never short of requests, whose prompts have nothing in common."""
    estimate = _estimate(
        architecture,
        gpu,
        1,
        mean_tokens=1.0,
        prompt_tokens=prompt,
        rollout={"max_tokens": response, "max_num_seqs": requests, "gpu_memory_utilization": 0.9},
    )
    batch = replace(estimate.rl_batch, lengths=_always(response))
    step_s = estimate.decode_step_s(requests, batch.resident_tokens)
    return requests * response / (response * step_s + estimate.prefill_seconds(requests * prompt))


def _always(length: int) -> Lengths:
    """Responses of that length each."""
    return Lengths(scale=1e6 * length, cap=length)
