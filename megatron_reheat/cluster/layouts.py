"""`reheat check --layouts`: the ways to lay a recipe out on so many GPUs, by what the estimate says of each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from megatron_reheat.cluster.estimate import Estimate
from megatron_reheat.cluster.gpus import GIB, NODE_GPUS
from megatron_reheat.cluster.preflight import MIN_WIDTH, estimate_on, gpu_called, require_fit
from megatron_reheat.config import Config
from megatron_reheat.errors import ConfigError
from megatron_reheat.methods import choose_method
from megatron_reheat.model.architecture import VALUE_BYTES, read_architecture
from megatron_reheat.recipe import apply_override, parse_config
from megatron_reheat.stages.inputs import context_length

SHOWN = 8
SIZES = (1, 2, 4, 8, 16)  # of tensor, pipeline and context parallelism, and of an engine
RECOMPUTE = ("none", "selective", "full")
FILLED = 0.95  # of a GPU's memory, where vLLM's share is chosen here
NEAR = 1.03  # times the fastest: too close for the estimate to tell


class Layout(NamedTuple):
    """One way, as overrides of the recipe, with its estimate."""

    overrides: tuple[str, ...]
    estimate: Estimate

    @property
    def phases(self) -> Mapping[str, float]:
        """Seconds of each phase of an RL step."""
        return self.estimate.rl_step()

    @property
    def step_s(self) -> float:
        """Of an RL step, seconds."""
        return sum(self.phases.values())

    @property
    def split(self) -> int:
        """GPUs that one copy of the model is cut over."""
        parallel = self.estimate.config.parallel
        return parallel.tensor * parallel.pipeline

    @property
    def gib(self) -> float:
        """On the fullest GPU."""
        return sum(self.estimate.memory().values()) / GIB


def layouts_that_fit(config: Config, gpus: int, gpu: str, mean_tokens: float | None = None) -> tuple[list[Layout], int]:
    """The recommended one first, then the fastest first; and how many were tried.

    What is tried: tensor (with sequence parallelism) and pipeline sizes that the model and a node allow, and where engines
    share the trainer's GPUs one engine for each replica or engines in turns with it, of any size. Of layouts that differ in
    recomputation, micro-batches and vLLM's share alone the fastest is kept. Of virtual pipeline stages there are as many as the
    recipe has, or none: what their messages cost is not in the estimate. Only where none of these fits, a micro-batch is split
    over context-parallel ranks, as few as will do. Of layouts that the estimate cannot tell from the fastest, the one that
    splits the model least is recommended: it depends least on the links.
    """
    tried = 0
    for context in SIZES:
        found, more = _of_context_size(context, config, gpus, gpu, mean_tokens)
        tried += more
        if found:
            limit = NEAR * min(layout.step_s for layout in found)
            return sorted(found, key=lambda layout: _rank(layout, limit)), tried
    return [], tried


def _of_context_size(
    context: int, config: Config, gpus: int, gpu: str, mean_tokens: float | None
) -> tuple[list[Layout], int]:
    found: list[Layout] = []
    tried = 0
    for overrides in _ways(config, gpus, context):
        best: Layout | None = None
        for changes in itertools.product(_microbatches(config), RECOMPUTE):
            tried += 1
            for layout in _made(config, (*overrides, *_said(*changes)), gpus, gpu, mean_tokens):
                if best is None or layout.step_s < best.step_s:
                    best = layout
        if best is not None:
            found.append(best)
    return found, tried


def _rank(layout: Layout, limit: float) -> tuple[float, ...]:
    if layout.step_s > limit:
        return (math.inf, layout.step_s, layout.gib)
    return (layout.split, layout.estimate.config.parallel.tensor, layout.step_s, layout.gib)


def _microbatches(config: Config) -> tuple[int | None, ...]:
    """None is the recipe's own; smaller ones need less memory, and none is smaller than the longest sequence."""
    longest = context_length(config, read_architecture(config.model).max_position_embeddings)
    return (None, longest) if longest < config.parallel.microbatch_tokens else (None,)


def _said(microbatch: int | None, recompute: str) -> Iterator[str]:
    if microbatch is not None:
        yield f"parallel.microbatch_tokens={microbatch}"
    yield f"model.recompute={recompute}"


def _ways(config: Config, gpus: int, context: int) -> Iterator[tuple[str, ...]]:
    mode = config.rollout.mode
    virtual = config.parallel.virtual_pipeline
    for tensor, pipeline, chunks in itertools.product(SIZES, SIZES, sorted({1, virtual})):
        block = tensor * pipeline * context
        if tensor > NODE_GPUS or gpus % block:
            continue
        trainer = [
            f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"parallel.data={gpus // block}",
            f"parallel.sequence_parallel={'true' if tensor > 1 else 'false'}",
        ]  # fmt: skip
        if context != config.parallel.context:
            trainer.append(f"parallel.context={context}")
        if virtual > 1:
            trainer.append(f"parallel.virtual_pipeline={chunks}")
        if not config.parallel.distributed_optimizer:
            trainer.append("parallel.distributed_optimizer=true")
        if mode == "server":
            yield tuple(trainer)
            continue
        yield (*trainer, "rollout.mode=embedded", "rollout.tensor=1")
        for engine in SIZES:
            if engine <= min(NODE_GPUS, gpus) and not gpus % engine:
                yield (*trainer, "rollout.mode=colocated", f"rollout.tensor={engine}")


def _made(
    config: Config, overrides: tuple[str, ...], gpus: int, gpu: str, mean_tokens: float | None
) -> Iterator[Layout]:
    """With vLLM's share as in the recipe and as the rest of the memory allows, where they fit; none where the model cannot be
    cut so."""
    own = _estimated(config, overrides, gpus, gpu, mean_tokens)
    if own is None:
        return
    if _fits(own, gpu):
        yield own
    rollout = config.rollout
    if rollout.mode == "server" or rollout.kv_cache_mb:
        return
    left = FILLED - own.gib / own.estimate.gpu.memory_gib
    share = math.floor(100 * (rollout.gpu_memory_utilization + left)) / 100
    if share > 0 and share != rollout.gpu_memory_utilization:
        changed = (*overrides, f"rollout.gpu_memory_utilization={share:g}")
        filled = _estimated(config, changed, gpus, gpu, mean_tokens)
        if filled is not None and _fits(filled, gpu):
            yield filled


def _estimated(
    config: Config, overrides: tuple[str, ...], gpus: int, gpu: str, mean_tokens: float | None
) -> Layout | None:
    """Whether or not it fits; None where the model cannot be cut so."""
    tree = config.model_dump()
    for override in overrides:
        apply_override(tree, override)
    try:
        return Layout(overrides, estimate_on(gpu_called(gpu), parse_config(tree), gpus=gpus, mean_tokens=mean_tokens))
    except ConfigError:
        return None


def _fits(layout: Layout, gpu: str) -> bool:
    try:
        require_fit(layout.estimate, gpu)
    except ConfigError:
        return False
    return True


def recommend(
    config: Config,
    *,
    gpus: int = NODE_GPUS,
    gpu: str = "h100-80g",
    mean_tokens: float | None = None,
    console: Console | None = None,
) -> None:
    """Prints the recommended layout and the fastest others, why it is that one, what it saves where, and its overrides on the
    last line.

    Raises:
        ConfigError: the recipe makes no sense, or none fits.
    """
    for check in (partial(gpu_called, gpu), partial(choose_method, config), partial(read_architecture, config.model)):
        check()  # what is wrong with all layouts alike
    choice, tried = layouts_that_fit(config, gpus, gpu, mean_tokens)
    if not choice:
        raise ConfigError(
            f"none of {tried} layouts fits {gpus} x {gpu}; use more or larger GPUs, or lower rollout.max_tokens"
        )
    if console is None:
        console = Console(highlight=False, markup=False)
        console.width = max(console.width, MIN_WIDTH)
    best = choice[0]
    table = Table(title=f"{config.run.name} on {gpus} x {gpu}: {len(choice)} layouts fit, of {tried} tried")
    times = ("RL step, s", "rollout", "update", "reheating")
    context = best.estimate.config.parallel.context  # of all of them
    split = " x CP" if context > 1 else ""
    for column in (f"TP x PP{split} x DP", "engines", "recompute", "tokens", "GiB", *times):
        table.add_column(column, justify="right")
    for layout in choice[:SHOWN]:
        e = layout.estimate
        p, rollout = e.config.parallel, e.config.rollout
        engines = f"{e.num_engines} x TP{rollout.tensor}, {rollout.mode}"
        seconds = (layout.step_s, layout.phases["rollout"], layout.phases["update"], sum(e.reheat_step().values()))
        recompute, microbatch = e.config.model.recompute, f"{p.microbatch_tokens:,}"
        pipeline = f"{p.pipeline}({p.virtual_pipeline})" if p.virtual_pipeline > 1 else p.pipeline
        sizes = f"{p.tensor} x {pipeline}{f' x {context}' if split else ''} x {e.data_size}"
        row = (sizes, engines, recompute, microbatch, f"{layout.gib:.1f}")
        table.add_row(*map(str, row), *(f"{s:.3g}" for s in seconds))
    console.print(table)
    console.print(f"All figures are estimates. {_split(choice)}", soft_wrap=True)
    console.print(_why(best, _own(config, gpus, gpu, mean_tokens)), soft_wrap=True)
    console.print(" ".join(best.overrides), soft_wrap=True)


def _own(config: Config, gpus: int, gpu: str, mean_tokens: float | None) -> Layout | None:
    """The recipe's, where it is one for so many GPUs and fits."""
    own = _estimated(config, (), gpus, gpu, mean_tokens)
    return own if own is not None and _fits(own, gpu) else None


def _split(choice: list[Layout]) -> str:
    """Why the first splits the model, or does not."""
    best, e = choice[0], choice[0].estimate
    if best.split == 1:
        replicas = f"the optimizer's state over {e.num_replicas} replicas"
        return f"The first leaves the model whole: no collectives in its layers, {replicas}."
    if whole := [layout for layout in choice if layout.split == 1]:
        more, changed = whole[0].step_s - best.step_s, whole[0].estimate.config
        memory = (
            f"model.recompute={changed.model.recompute} parallel.microbatch_tokens={changed.parallel.microbatch_tokens}"
        )
        return f"With the model whole a step takes {more:.3g} s more: memory leaves it {memory}."
    held = VALUE_BYTES[e.config.model.dtype] + 4 + e.optimizer_bytes / e.num_gpus
    gib = f"{e.model.num_parameters * held / GIB:.1f} of {e.gpu.memory_gib:.4g} GiB"
    return f"With the model whole none fits: its weights, gradients and part of the optimizer take {gib}."


def _why(best: Layout, own: Layout | None) -> str:
    if own is None:
        return "The recipe's own layout is for another number of GPUs, or does not fit."
    if math.isclose(own.step_s, best.step_s, rel_tol=0.01):
        return f"The recipe's own layout is as fast as any, to within 1%: {own.step_s:.3g} s a step."
    changes = {phase: own.phases[phase] - seconds for phase, seconds in best.phases.items()}
    parts = [f"{phase} {-saved:+.3g} s" for phase, saved in changes.items() if abs(saved) >= 0.005 * own.step_s]
    text = f"An RL step of the first takes {best.step_s:.3g} s, of the recipe's own layout {own.step_s:.3g}"
    return f"{text}: {', '.join(parts)}."
