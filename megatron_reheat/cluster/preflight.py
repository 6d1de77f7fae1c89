"""`reheat check`: what a recipe will do to a cluster, before any GPU is held. Validates, then prints the estimate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from megatron_reheat.cluster.estimate import (
    CONSTANT_TEXTS,
    GIB,
    GPUS,
    NODE_GPUS,
    Batch,
    Estimate,
)
from megatron_reheat.cluster.published import comparisons
from megatron_reheat.config import Config
from megatron_reheat.errors import ConfigError
from megatron_reheat.model.architecture import read_architecture
from megatron_reheat.model.provider import check_layout
from megatron_reheat.stages.inputs import context_length

MAX_GPUS = 1024
# of scaling: at the knee more than half of the added GPUs still pay
KNEE_EFFICIENCY = 0.5
MIN_WIDTH = 110
MAX_MEAN_TOKENS = 2048
MEAN_PROMPT_TOKENS = 256


def check(
    config: Config,
    *,
    gpus: int | None = None,
    gpu: str = "h100-80g",
    mean_tokens: float | None = None,
    console: Console | None = None,
) -> None:
    """Prints batches, memory, time and scaling of `config` on `gpus` devices.

    Args:
        gpus: number of devices; by default what `parallel` asks for, and one node where `parallel.data` is empty.
        gpu: a key of `GPUS`.
        mean_tokens: mean response length under rollout.max_tokens; by default a quarter of it, at most 2048.

    Raises:
        ConfigError: the recipe, the layout or the memory does not work out; the message names the key to change.
    """
    estimate = make_estimate(config, gpus=gpus, gpu=gpu, mean_tokens=mean_tokens)
    if console is None:
        console = Console(highlight=False)
        console.width = max(console.width, MIN_WIDTH)
    _print_header(console, estimate, gpu)
    console.print(_batch_table(estimate))
    console.print(_memory_table(estimate))
    _check_memory(estimate, gpu)
    console.print(_time_table(estimate))
    _print_duration(console, estimate)
    console.print(_scaling_table(estimate))
    console.print(_published_table(estimate))
    console.print(_constants_table(estimate, gpu))
    console.print(
        "All figures are estimates. Not checked: data, tokenizer, weights. Not modeled: grading, evaluation, checkpoints."
    )


def make_estimate(
    config: Config, *, gpus: int | None = None, gpu: str = "h100-80g", mean_tokens: float | None = None
) -> Estimate:
    """The validated estimate of `config`; see `check`."""
    if gpu not in GPUS:
        raise ConfigError(f"--gpu {gpu} is not known; use one of {', '.join(GPUS)}")
    p = config.parallel
    model_parallel = p.tensor * p.pipeline
    if gpus is None:
        gpus = model_parallel * p.data if p.data else max(NODE_GPUS, model_parallel)
    if gpus < 1:
        raise ConfigError(f"--gpus {gpus} must be at least 1")
    config.data_parallel(gpus)
    if p.tensor > NODE_GPUS:
        raise ConfigError(
            f"parallel.tensor {p.tensor} exceeds the {NODE_GPUS} GPUs of a node, between which it communicates in every "
            "layer; lower it and raise parallel.pipeline"
        )
    model = read_architecture(config.model)
    check_layout(model, config)
    context_length(config, model.max_position_embeddings)
    cap = config.rollout.max_tokens
    mean = min(cap / 4, MAX_MEAN_TOKENS) if mean_tokens is None else mean_tokens
    prompt = min(config.data.max_prompt_tokens, MEAN_PROMPT_TOKENS)
    estimate = Estimate(config, model, GPUS[gpu], gpus, mean, prompt)
    _ = estimate.rl_batch  # refuses an impossible mean
    return estimate


def _check_memory(estimate: Estimate, gpu: str) -> None:
    """Raises ConfigError when vLLM cannot start, or the parts exceed the device."""
    config = estimate.config
    longest = context_length(config, estimate.model.max_position_embeddings)
    if estimate.kv_cache_tokens < longest:
        key = "rollout.kv_cache_mb" if config.rollout.kv_cache_mb else "rollout.gpu_memory_utilization"
        raise ConfigError(
            f"vLLM's share of {gpu} leaves a KV cache of {max(0, int(estimate.kv_cache_tokens)):,} tokens beside "
            f"{estimate.engine_weight_bytes / GIB:.1f} GiB of weights, less than one sequence of {longest:,}; raise {key} or "
            "lower rollout.max_tokens"
        )
    total = sum(estimate.memory().values()) / GIB
    if total > estimate.gpu.memory_gib:
        raise ConfigError(
            f"about {total:.1f} GiB are needed on a {gpu} of {estimate.gpu.memory_gib:g}; {_memory_advice(estimate)}"
        )


def _memory_advice(estimate: Estimate) -> str:
    config, advice = estimate.config, []
    if config.model.recompute != "full":
        advice.append("set model.recompute=full")
    if not config.model.fused_head:
        advice.append("set model.fused_head=true")
    longest = context_length(config, estimate.model.max_position_embeddings)
    if config.parallel.microbatch_tokens > longest:
        advice.append(f"lower parallel.microbatch_tokens (not below {longest})")
    return ", ".join([*advice, "raise parallel.tensor", "or lower rollout.gpu_memory_utilization"])


# -- tables ------------------------------------------------------------------------------------------------------------


def _print_header(console: Console, e: Estimate, gpu: str) -> None:
    p = e.config.parallel
    nodes = math.ceil(e.num_gpus / NODE_GPUS)
    console.print(f"{e.config.run.name}: {e.config.model.hf_path}, {e.model.num_parameters:,} parameters")
    console.print(
        f"{e.num_gpus} x {gpu} ({nodes} node{'s' * (nodes > 1)} of up to {NODE_GPUS}): tensor {p.tensor} x pipeline "
        f"{p.pipeline} x data {e.num_replicas}; {_engines(e)}"
    )
    idle = e.num_gpus - e.num_replicas
    if idle and gpu != "cpu" and e.config.rollout.mode == "embedded":
        console.print(
            f"note: {idle} of {e.num_gpus} GPUs have no engine and wait during rollouts (one engine per replica); "
            "rollout.mode=colocated has one on each"
        )
    if e.num_engines > e.rl_batch.prompts:
        console.print(
            f"note: {e.num_engines} engines share rl.prompts_per_step {e.rl_batch.prompts} prompts: "
            f"{e.num_engines - e.rl_batch.prompts} engines have nothing to sample in an RL step"
        )


def _engines(e: Estimate) -> str:
    rollout, count = e.config.rollout, e.num_engines
    devices = "one device" if rollout.tensor == 1 else f"{rollout.tensor} devices"
    where = {
        "embedded": "",
        "colocated": ", asleep while the trainer works",
        "server": ", beside the GPUs counted here",
    }
    return f"{count} vLLM engine{'s' * (count > 1)} of {devices} each{where[rollout.mode]}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    return table


def _batch_table(e: Estimate) -> Table:
    table = _table("Batches, per step", "", "RL", "reheating")
    both = (e.rl_batch, e.reheat_batch)

    def row(label: str, show: Callable[[Batch], str]) -> None:
        table.add_row(label, *(show(b) for b in both))

    row("prompts x group", lambda b: f"{b.prompts} x {b.group_size}")
    row("= sequences", lambda b: f"{b.sequences:,}")
    row("tokens (prompt + mean response)", lambda b: f"{b.tokens:,.0f} ({b.prompt_tokens:.0f} + {b.lengths.mean:.0f})")
    row("optimizer steps (minibatches)", lambda b: f"{b.minibatches}")
    row("sequences of a minibatch", lambda b: f"{b.sequences // b.minibatches:,}")
    row("tokens of a minibatch on a rank", lambda b: f"{b.tokens_per_replica:,.0f}")
    row(
        "micro-batches on a rank",
        lambda b: f"{b.microbatches} of up to {b.microbatch_tokens:,} tokens",
    )
    row("sequences of an engine", lambda b: f"{b.sequences_per_engine:,}")
    row("of these at a time (KV cache)", lambda b: f"{e.concurrent_sequences(b):,.0f}")
    return table


def _memory_table(e: Estimate) -> Table:
    table = _table("Memory of the fullest GPU", "component", "GiB")
    parts = e.memory()
    for name, size in parts.items():
        table.add_row(name, f"{size / GIB:.2f}")
    table.add_section()
    table.add_row(f"total of {e.gpu.memory_gib:g}", f"{sum(parts.values()) / GIB:.2f}")
    return table


def _time_table(e: Estimate) -> Table:
    rl, reheat = e.rl_step(), e.reheat_step()
    table = _table("Seconds per step", "stage", *rl, "step", "trained tok/s/GPU")
    for name, phases, batch in (("RL", rl, e.rl_batch), ("reheating", reheat, e.reheat_batch)):
        step = sum(phases.values())
        rate = batch.tokens / step / e.num_gpus
        table.add_row(name, *(_seconds(s) for s in phases.values()), _seconds(step), f"{rate:,.0f}")
    return table


def _print_duration(console: Console, e: Estimate) -> None:
    steps, c = e.config.run.steps, e.config.controller
    rl, reheat = sum(e.rl_step().values()), sum(e.reheat_step().values())
    text = f"{steps} RL steps take about {steps * rl / 3600:.1f} h"
    if c.action == "reheat":
        extra = c.max_reheat_steps * (reheat - rl) / 3600
        text += f"; each round of {c.max_reheat_steps} reheating steps among them changes that by {extra:+.1f} h"
    console.print(text)


def _scaling_table(e: Estimate) -> Table:
    rows = scaling(e)
    knee = find_knee(rows)
    table = _table(
        f"Scaling of the same batch; knee at {knee} GPUs (efficiency >= {KNEE_EFFICIENCY:.0%})",
        "GPUs",
        "RL s/step",
        "reheating s/step",
        "speed-up (RL)",
        "efficiency",
    )
    first_gpus, first_rl, _ = rows[0]
    for gpus, rl, reheat in rows:
        speed_up = first_rl / rl
        table.add_row(
            f"{gpus}{' <' if gpus == knee else ''}",
            _seconds(rl),
            _seconds(reheat),
            f"{speed_up:.2f}",
            f"{speed_up * first_gpus / gpus:.0%}",
        )
    return table


def scaling(e: Estimate) -> list[tuple[int, float, float]]:
    """(GPUs, RL seconds, reheating seconds) for more and more replicas of the same tensor x pipeline block, same batch."""
    p = e.config.parallel
    config = e.config.model_copy(update={"parallel": p.model_copy(update={"data": None})})
    gpus = p.tensor * p.pipeline
    while gpus < NODE_GPUS:
        gpus *= 2
    rows = []
    while gpus <= MAX_GPUS:
        at = dataclasses.replace(e, config=config, num_gpus=gpus)
        rows.append((gpus, sum(at.rl_step().values()), sum(at.reheat_step().values())))
        gpus *= 2
    return rows


def find_knee(rows: list[tuple[int, float, float]]) -> int:
    """The most GPUs at which the RL step is at least KNEE_EFFICIENCY as efficient as at the fewest."""
    first_gpus, first_rl, _ = rows[0]
    return max(gpus for gpus, rl, _ in rows if first_gpus * first_rl >= KNEE_EFFICIENCY * gpus * rl)


def _published_table(e: Estimate) -> Table:
    table = _table("This model against published figures (1.00 would be exact)", "set-up", "unit", "published")
    table.add_column("model", justify="right")
    table.add_column("ratio", justify="right")
    table.add_column("caveat")
    for c in comparisons(e.rl_batch.lengths.mean if e.config.rollout.max_tokens == 8192 else MAX_MEAN_TOKENS):
        table.add_row(c.what, c.unit, _figure(c.published), _figure(c.modeled), f"{c.ratio:.2f}", c.caveat)
    return table


def _constants_table(e: Estimate, gpu: str) -> Table:
    table = _table("Constants", "what", "value")
    g = e.gpu
    table.add_row(f"{gpu}: memory, GiB", f"{g.memory_gib:g}")
    table.add_row(f"{gpu}: dense bf16 FLOP/s", f"{g.flops:.3g}")
    table.add_row(
        f"{gpu}: memory, NVLink, network bytes/s",
        f"{g.memory_bytes_s:.3g}, {g.nvlink_bytes_s:.3g}, {g.network_bytes_s:.3g}",
    )
    for field, text in CONSTANT_TEXTS.items():
        table.add_row(text, f"{getattr(g.constants, field):g}")
    return table


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else _seconds(value)


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
