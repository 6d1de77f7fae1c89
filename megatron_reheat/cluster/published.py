"""The analytic model against what others have published: each row repeats a published set-up and prints both numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron_reheat.cluster.estimate import Estimate
from megatron_reheat.cluster.gpus import GPUS
from megatron_reheat.cluster.workload import Lengths
from megatron_reheat.model.architecture import LLAMA_31_8B, QWEN3, Architecture
from megatron_reheat.recipe import parse_config

_NO_FILTER = {"dynamic_sampling": False}
BLIND = "no constant was set by it"


@dataclass(frozen=True)
class Comparison:
    """`published` and `modeled` in `unit`; `caveat` says what the published number leaves open."""

    what: str
    unit: str
    published: float
    modeled: float
    caveat: str = ""

    @property
    def ratio(self) -> float:
        """Modeled over published."""
        return self.modeled / self.published


def comparisons(mean_tokens: float) -> list[Comparison]:
    """`mean_tokens` stands in where a paper does not give its mean response length (cap 8192)."""
    small, large = QWEN3["Qwen3-4B"], QWEN3["Qwen3-8B"]
    unknown = f"mean length unpublished, {mean_tokens:.0f} assumed; dynamic sampling off"
    rows = [
        Comparison(
            f"prime-rl: {what}, Qwen3-4B, 8 x H100, {length:,} tokens, update alone",
            "tok/s/GPU",
            published,
            _update_tokens_per_s(small, length, fused_head=fused),
        )
        for what, length, published, fused in (
            ("RL", 16_384, 3253.0, True),
            ("RL", 65_536, 3621.0, True),
            ("SFT", 16_384, 6215.0, False),
        )
    ]
    rows += [
        Comparison(
            "Megatron-Bridge: pretraining, Qwen3-8B, 16 x H100, TP1, 4,096 tokens, update alone",
            "tok/s/GPU",
            10_488.0,
            _update_tokens_per_s(large, 4096, fused_head=True, num_gpus=16, sequences=16, recompute="none"),
            f"{BLIND}; 16 sequences a GPU assumed",
        ),
        Comparison(
            "vLLM 0.30: Qwen3-8B, one H100, 128 tokens in, 1,024 out, 396 at a time",
            "tok/s",
            13_322.0,
            _decode_tokens_per_s(large, requests=396, prompt=128, response=1024),
            BLIND,
        ),
    ]
    nemo = _estimate(
        LLAMA_31_8B,
        16,
        mean_tokens=1019,
        parallel={"pipeline": 2},
        rollout={"max_tokens": 4096},
        rl={"prompts_per_step": 64, "group_size": 32, "minibatch_prompts": 16, "dynamic_sampling": False},
    )
    step = sum(nemo.rl_step().values())
    tokens = nemo.rl_batch.tokens / step / 16
    set_up = "NeMo-RL: GRPO, Llama-3.1-8B, 16 x H100, on-policy"
    engines = "ours: one engine per replica, 8 for their 16; prompts of 256 assumed"
    rows.append(Comparison(set_up, "tok/s/GPU", 1581.0, tokens, engines))
    rows.append(Comparison(set_up, "s/step", 92.8, step, engines))
    for name, model, rl_s, reheat_s, layout in (
        ("Qwen3-4B", small, 200.0, 1035.0, {}),
        ("Qwen3-8B", large, 240.0, 1370.0, {"tensor": 2, "sequence_parallel": True}),
    ):
        paper = _estimate(model, 8, mean_tokens, parallel=layout, rollout={"max_tokens": 8192}, rl=_NO_FILTER)
        set_up = f"TS-OPSD paper: {name}, 8 x H800"
        rows.append(Comparison(f"{set_up}, DAPO", "s/step", rl_s, sum(paper.rl_step().values()), unknown))
        rows.append(Comparison(f"{set_up}, reheating", "s/step", reheat_s, sum(paper.reheat_step().values()), unknown))
    caveat = "published 0.21 to 0.34; ours: through host memory"
    sync = _estimate(small, 8, mean_tokens, rollout={"max_tokens": 8192}).sync_seconds()
    rows.append(Comparison("NeMo-RL: weight sync by NCCL, Qwen3-4B, 8 x H100", "s", 0.28, sync, caveat))
    return [*rows, _demo()]


def _demo() -> Comparison:
    """examples/countdown_cpu on two cores of an Intel Xeon, its RL step: `scripts.bench_loop`'s median of 30."""
    model = Architecture(96, 288, 3, 4, 2, 32, 22, True, 64)
    demo = _estimate(
        model,
        2,
        mean_tokens=6.4,
        gpu="cpu",
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
        "this project's demo, 0.36M parameters, 2 CPU cores", "s/step", 0.84, step, "with grading, 0.02 s"
    )


def _estimate(
    architecture: Architecture,
    num_gpus: int,
    mean_tokens: float,
    *,
    gpu: str = "h100-80g",
    prompt_tokens: float = 256.0,
    **sections: dict[str, Any],
) -> Estimate:
    sections["model"] = {"hf_path": "-", "recompute": "full", **sections.get("model", {})}
    sections["data"] = {"path": "-", "max_prompt_tokens": 1024, **sections.get("data", {})}
    return Estimate(parse_config(sections), architecture, GPUS[gpu], num_gpus, mean_tokens, prompt_tokens)


def _update_tokens_per_s(
    architecture: Architecture,
    length: int,
    *,
    fused_head: bool,
    num_gpus: int = 8,
    sequences: int = 1,
    recompute: str = "full",
) -> float:
    """Forward, backward and optimizer, so many full-length sequences per GPU and step, one a micro-batch."""
    estimate = _estimate(
        architecture,
        num_gpus,
        mean_tokens=1.0,
        model={"fused_head": fused_head, "recompute": recompute},
        data={"max_prompt_tokens": 1},
        rollout={"max_tokens": 2},
        reheat={"max_tokens": 2},
        parallel={"microbatch_tokens": length},
    )
    batch = replace(
        estimate.rl_batch,
        prompts=num_gpus * sequences,
        group_size=1,
        lengths=_always(length),
        prompt_tokens=0.0,
    )
    seconds = estimate.pass_seconds(batch, training=True) + estimate.optimizer_seconds()
    return batch.tokens / num_gpus / seconds


def _decode_tokens_per_s(architecture: Architecture, *, requests: int, prompt: int, response: int) -> float:
    """Of one engine on one GPU that is never short of requests."""
    estimate = _estimate(
        architecture,
        1,
        mean_tokens=1.0,
        prompt_tokens=prompt,
        rollout={"max_tokens": response, "max_num_seqs": requests, "gpu_memory_utilization": 0.9},
    )
    batch = replace(estimate.rl_batch, lengths=_always(response))
    return requests / estimate.decode_step_s(requests, batch.resident_tokens)


def _always(length: int) -> Lengths:
    """Responses of that length each."""
    return Lengths(scale=1e6 * length, cap=length)
