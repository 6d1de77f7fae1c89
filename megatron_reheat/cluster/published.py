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
    """examples/countdown_cpu on two cores, its RL step: median of 175 steps before the collapse."""
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
        "this project's demo, 0.36M parameters, 2 CPU cores", "s/step", 0.89, step, "with grading, 0.08 s"
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


def _update_tokens_per_s(architecture: Architecture, length: int, *, fused_head: bool) -> float:
    """Forward, backward and optimizer, one full-length sequence per GPU and step."""
    estimate = _estimate(
        architecture,
        8,
        mean_tokens=1.0,
        model={"fused_head": fused_head},
        parallel={"microbatch_tokens": length},
    )
    always_longest = Lengths(scale=1e6 * length, cap=length)
    batch = replace(estimate.rl_batch, prompts=8, group_size=1, lengths=always_longest, prompt_tokens=0.0)
    seconds = estimate.pass_seconds(batch, training=True) + estimate.optimizer_seconds()
    return batch.tokens / 8 / seconds
