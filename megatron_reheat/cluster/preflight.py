"""`reheat check`: what a recipe will do to a cluster, before any GPU is held. Validates, then prints the estimate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_reheat.cluster.estimate import Estimate
from megatron_reheat.cluster.gpus import CONSTANT_TEXTS, GIB, GPUS, NODE_GPUS, Gpu
from megatron_reheat.cluster.published import comparisons
from megatron_reheat.cluster.workload import Batch, FrozenShape
from megatron_reheat.config import Config, ModelConfig
from megatron_reheat.errors import ConfigError
from megatron_reheat.methods import choose_method
from megatron_reheat.model.architecture import read_architecture
from megatron_reheat.model.hf_reader import HFReader
from megatron_reheat.model.hf_weights import saved_dtype
from megatron_reheat.model.provider import check_layout, is_local, resolve_hf_folder
from megatron_reheat.recipe import apply_override, parse_config
from megatron_reheat.rewards.graders import check_reward
from megatron_reheat.stages.inputs import context_length, read_frozen, read_model, speaks_in_turns

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
    verbose: bool = True,
    console: Console | None = None,
) -> None:
    """Prints memory and time of `config` on `gpus` devices, if `verbose` batches, scaling and what it rests on too; the last
    line says whether it fits.

    Args:
        gpus: number of devices; by default what `parallel` asks for, and one node where `parallel.data` is empty.
        gpu: a key of `GPUS`.
        mean_tokens: mean response length under rollout.max_tokens; by default a quarter of it, at most 2048.

    Raises:
        ConfigError: the recipe, the model's folder, the layout or the memory does not work out; the message names the key
            to change.
    """
    estimate = make_estimate(config, gpus=gpus, gpu=gpu, mean_tokens=mean_tokens)
    not_checked = "data"
    if is_local(config.model.hf_path):
        policy = read_model(config.model, chat=speaks_in_turns(config))
        for name, folder in config.rl.samplers.items():
            if is_local(folder):
                read_frozen(config, name, policy)
    else:
        not_checked += ", tokenizer, weights"  # which would have to be downloaded
    if console is None:
        console = Console(highlight=False, markup=False)
        console.width = max(console.width, MIN_WIDTH)
    _print_header(console, estimate, gpu)
    if verbose:
        console.print(_batch_table(estimate))
    console.print(_memory_table(estimate))
    require_fit(estimate, gpu)
    console.print(_time_table(estimate))
    if verbose:
        console.print(_sync(estimate), soft_wrap=True)
        console.print(_scaling_table(estimate))
        console.print(_published_table(estimate))
        console.print(_constants_table(estimate, gpu))
    more = "" if verbose else " (--verbose: batches, scaling, what the estimate rests on)"
    console.print(
        f"All figures are estimates{more}. Not checked: {not_checked}. Not modeled: grading, evaluation, a checkpoint's time."
    )
    total = sum(estimate.memory().values()) / GIB
    fits = f"fits: {total:.1f} of {estimate.gpu.memory_gib:.4g} GiB on each {gpu}; {_duration(estimate)}"
    console.print(fits, soft_wrap=True)


def make_estimate(
    config: Config, *, gpus: int | None = None, gpu: str = "h100-80g", mean_tokens: float | None = None
) -> Estimate:
    """The validated estimate of `config`; see `check`."""
    kind = gpu_called(gpu)
    choose_method(config)
    check_reward(config.reward)
    return estimate_on(kind, config, gpus=gpus, mean_tokens=mean_tokens)


def gpu_called(name: str) -> Gpu:
    """
    Raises:
        ConfigError: there is none of that name.
    """
    if name not in GPUS:
        raise ConfigError(f"--gpu {name} is not known; use one of {', '.join(GPUS)}")
    return GPUS[name]


def estimate_on(gpu: Gpu, config: Config, *, gpus: int | None = None, mean_tokens: float | None = None) -> Estimate:
    """The same for any device."""
    p = config.parallel
    if gpus is None:
        gpus = p.block * p.data if p.data else max(NODE_GPUS, p.block)
    if gpus < 1:
        raise ConfigError(f"--gpus {gpus} must be at least 1")
    config.data_parallel(gpus)
    if p.tensor > NODE_GPUS and gpu is not GPUS["cpu"]:
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
    estimate = Estimate(config, model, gpu, gpus, mean, prompt, frozen_shapes(config))
    _ = estimate.rl_batch  # refuses an impossible mean
    return estimate


def frozen_shapes(config: Config) -> dict[str, FrozenShape]:
    """The models of `rl.samplers`; bfloat16 where a folder's weights are not at hand."""
    if not config.rl.samplers:
        return {}
    shares, shapes = choose_method(config).costs(config).frozen, {}
    for name, path in config.rl.samplers.items():
        source = ModelConfig(hf_path=path)
        try:
            model = read_architecture(source)
        except ConfigError as error:
            raise type(error)(f"rl.samplers.{name}: {str(error).removeprefix('model.hf_path: ')}") from None
        dtype = saved_dtype(HFReader(resolve_hf_folder(source))) if is_local(path) else "bfloat16"
        shapes[name] = FrozenShape(model, dtype, shares.get(name, 1.0))
    return shapes


def require_fit(estimate: Estimate, gpu: str) -> None:
    """What `reheat check`, `reheat slurm` and a start on GPUs ask of memory. `gpu` is how the device is called.

    Raises:
        ConfigError: vLLM could not start, or the parts exceed the device; the message says what would fit.
    """
    config = estimate.config
    longest = context_length(config, estimate.model.max_position_embeddings)
    key = "rollout.kv_cache_mb" if config.rollout.kv_cache_mb else "rollout.gpu_memory_utilization"
    served = {f" for {name}" for name, urls in config.rl.sampler_servers.items() if urls}
    served |= {""} if config.rollout.servers else set()
    for whose, e in {"": estimate, **{f" for {name}": e for name, e in estimate.samplers.items()}}.items():
        if e.kv_cache_tokens < longest and whose not in served:  # whose devices are not known here
            raise ConfigError(
                f"vLLM's share of {gpu}{whose} leaves a KV cache of {max(0, int(e.kv_cache_tokens)):,} tokens beside "
                f"{e.engine_weight_bytes / GIB:.1f} GiB of weights, less than one sequence of {longest:,}; raise {key}, "
                f"lower rollout.max_tokens, or split the engine (rollout.mode=colocated, rollout.tensor above "
                f"{config.rollout.tensor})"
            )
    total = sum(estimate.memory().values()) / GIB
    if total > estimate.gpu.memory_gib:
        raise ConfigError(
            f"about {total:.1f} GiB are needed on a {gpu} of {estimate.gpu.memory_gib:.4g}; {_memory_advice(estimate, total)}"
        )


def _memory_advice(estimate: Estimate, total: float) -> str:
    """The single changes that make it fit, each with what it needs then; where there is none, what helps."""
    needed = {change: gib for change in _changes(estimate, total) if (gib := _changed_gib(estimate, change)) < total}
    if enough := {change: gib for change, gib in needed.items() if gib <= estimate.gpu.memory_gib}:
        return f"set {' or '.join(f'{change} ({gib:.1f} GiB)' for change, gib in enough.items())}"
    helpful = ", ".join(f"{change} ({gib:.1f} GiB)" for change, gib in needed.items())
    return f"set several of {helpful}, or use more GPUs" if needed else "use larger GPUs"


def _changes(estimate: Estimate, total: float) -> Iterator[str]:
    """Overrides that may lower what the fullest GPU holds, those with the least cost in time first."""
    config, memory = estimate.config, estimate.gpu.memory_gib
    p, utilization = config.parallel, config.rollout.gpu_memory_utilization
    yield "model.fused_head=true"
    yield "parallel.distributed_optimizer=true"
    if p.virtual_pipeline > 1:
        yield "parallel.virtual_pipeline=1"
    yield "model.recompute=full"
    yield f"parallel.microbatch_tokens={context_length(config, estimate.model.max_position_embeddings)}"
    if config.rollout.mode == "embedded":
        yield "rollout.mode=colocated"
    if config.rollout.mode != "server" and (lower := math.floor(100 * (utilization - total / memory + 1)) / 100) > 0:
        yield f"rollout.gpu_memory_utilization={lower:g}"
    while (tensor := 2 * p.tensor) <= min(NODE_GPUS, estimate.num_gpus // (p.pipeline * p.context)):
        p = p.model_copy(update={"tensor": tensor, "data": p.data and p.data // 2})
        yield f"parallel.tensor={tensor}" + (f" parallel.data={p.data}" if p.data else "")
    p = config.parallel
    while 2 * p.block <= estimate.num_gpus:
        p = p.model_copy(update={"context": 2 * p.context, "data": p.data and p.data // 2})
        yield f"parallel.context={p.context}" + (f" parallel.data={p.data}" if p.data else "")


def _changed_gib(estimate: Estimate, change: str) -> float:
    """GiB on the fullest GPU after overrides, infinite where they cannot be."""
    tree = estimate.config.model_dump()
    try:
        for override in change.split():
            apply_override(tree, override)
        changed = dataclasses.replace(estimate, config=parse_config(tree))
        check_layout(changed.model, changed.config)
        changed.config.data_parallel(changed.num_gpus)
        choose_method(changed.config)
    except ConfigError:
        return math.inf
    longest = context_length(changed.config, changed.model.max_position_embeddings)
    return sum(changed.memory().values()) / GIB if changed.kv_cache_tokens >= longest else math.inf


# -- tables ------------------------------------------------------------------------------------------------------------


def _print_header(console: Console, e: Estimate, gpu: str) -> None:
    p = e.config.parallel
    nodes = math.ceil(e.num_gpus / NODE_GPUS)
    console.print(f"{e.config.run.name}: {e.config.model.hf_path}, {e.model.num_parameters:,} parameters")
    console.print(
        f"{e.num_gpus} x {gpu} ({nodes} node{'s' * (nodes > 1)} of up to {NODE_GPUS}): {p.layout(e.data_size)}; {_engines(e)}"
    )
    console.print(_method(e))
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


def _method(e: Estimate) -> str:
    costs = e.costs
    changes = {
        "more completions sampled": max(costs.sampled, 0.0),
        "fewer completions sampled of the policy": -min(costs.sampled, 0.0),
        **{f"sampled from {name} ({path})": costs.frozen.get(name, 1.0) for name, path in e.config.rl.samplers.items()},
        "more sequences trained on": costs.trained,
        "of the sequences scored once more": costs.scored,
        "of the sequences read by a teacher in the updates": costs.read,
        "of the LM head's work once more": costs.heads,
    }
    parts = [f"{x:.3g}x {what}" if x > 1 else f"{x:.0%} {what}" for what, x in changes.items() if x]
    return f"method {Path(e.config.rl.method).name}, beyond GRPO's step: {', '.join(parts) or 'nothing'}"


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
    context = e.config.parallel.context
    row("tokens of a minibatch on a rank", lambda b: f"{b.tokens_per_block / context:,.0f}")
    row(
        "micro-batches on a rank",
        lambda b: f"{b.microbatches} of up to {b.microbatch_tokens // context:,} tokens",
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
    on_host = {"weights for a rollback": e.snapshot_bytes} if e.config.controller.trains else {}
    on_host |= {"the frozen teacher": e.teacher_bytes} if e.has_frozen_teacher else {}
    on_host |= {"the reference policy": e.reference_bytes} if e.has_reference else {}
    stages = (0, e.config.parallel.pipeline - 1)
    held = {name: max(map(size, stages)) / GIB for name, size in on_host.items()}
    if held:
        on_node = min(NODE_GPUS, e.num_gpus)
        table.add_section()
        for name, size in held.items():
            table.add_row(f"host memory: {name}", f"{size:.2f}")
        table.add_row(f"for all {on_node} GPUs of a node", f"{sum(held.values()) * on_node:.2f}")
    table.add_section()
    first_node = e.save_bytes(min(NODE_GPUS, e.num_gpus)) / GIB
    table.add_row("the first node's host memory while a checkpoint is written", f"{first_node:.2f}")
    if e.samplers and e.config.rollout.mode == "colocated":
        table.add_section()
        for name, frozen in e.samplers.items():
            table.add_row(f"host memory: {name} while it sleeps", f"{frozen.engine_weight_bytes / GIB:.2f}")
    return table


def _time_table(e: Estimate) -> Table:
    rl, reheat = e.rl_step(), e.reheat_step()
    table = _table("Seconds per step", "stage", *rl, "step", "trained tok/s/GPU")
    for name, phases, batch in (("RL", rl, e.rl_batch), ("reheating", reheat, e.reheat_batch)):
        step = sum(phases.values())
        rate = batch.tokens / step / e.num_gpus
        table.add_row(name, *(_seconds(s) for s in phases.values()), _seconds(step), f"{rate:,.0f}")
    return table


def _sync(e: Estimate) -> str:
    size = e.model.num_parameters * e.engine_value_bytes / GIB
    parts = [f"{part} {seconds:.2f} s" for part, seconds in e.sync_parts().items() if seconds >= 0.005]
    return f"A weight sync, {size:.1f} GiB, takes {e.sync_seconds():.2f} s{': ' if parts else ''}{', '.join(parts)}."


def _duration(e: Estimate) -> str:
    steps, c = e.config.run.steps, e.config.controller
    rl, reheat = sum(e.rl_step().values()), sum(e.reheat_step().values())
    text = f"{steps} RL steps take about {steps * rl / 3600:.1f} h"
    if c.trains:
        extra = c.max_reheat_steps * (reheat - rl) / 3600
        text += f"; each round of {c.max_reheat_steps} reheating steps among them changes that by {extra:+.1f} h"
    return text


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
    """(GPUs, RL seconds, reheating seconds) for more and more replicas of the same block of ranks, same batch."""
    p = e.config.parallel
    config = e.config.model_copy(update={"parallel": p.model_copy(update={"data": None})})
    gpus = p.block
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
    for column in ("model", "ratio"):
        table.add_column(column, justify="right")
    for column in ("set", "assumed"):
        table.add_column(column)
    for c in comparisons(e.rl_batch.lengths.mean if e.config.rollout.max_tokens == 8192 else MAX_MEAN_TOKENS):
        used = "calibration" if c.calibration else "validation"
        table.add_row(c.what, c.unit, _figure(c.published), _figure(c.modeled), f"{c.ratio:.2f}", used, c.assumed)
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
