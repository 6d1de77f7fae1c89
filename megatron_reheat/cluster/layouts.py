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
from megatron_reheat.model.architecture import read_architecture
from megatron_reheat.recipe import apply_override, parse_config

SHOWN = 8
SIZES = (1, 2, 4, 8, 16)  # of tensor, pipeline and context parallelism, and of an engine
RECOMPUTE = ("none", "selective", "full")


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
    def gib(self) -> float:
        """On the fullest GPU."""
        return sum(self.estimate.memory().values()) / GIB


def layouts_that_fit(config: Config, gpus: int, gpu: str, mean_tokens: float | None = None) -> tuple[list[Layout], int]:
    """The fastest first, of layouts that differ in recomputation alone the one that recomputes least; and how many were tried.

    What is tried: tensor (with sequence parallelism) and pipeline sizes that the model and a node allow, recomputation, and
    where engines share the trainer's GPUs one engine for each replica or engines in turns with it, of any size. Of virtual
    pipeline stages as many as the recipe has, and none: what their messages cost is not in the estimate. Only where none of
    these fits, a micro-batch is split over context-parallel ranks, as few as will do.
    """
    tried = 0
    for context in SIZES:
        found, more = _of_context_size(context, config, gpus, gpu, mean_tokens)
        tried += more
        if found:
            return sorted(found, key=lambda layout: (layout.step_s, layout.gib)), tried
    return [], tried


def _of_context_size(
    context: int, config: Config, gpus: int, gpu: str, mean_tokens: float | None
) -> tuple[list[Layout], int]:
    found: list[Layout] = []
    tried = 0
    for overrides in _ways(config, gpus, context):
        best: Layout | None = None
        for recompute in RECOMPUTE:
            tried += 1
            layout = _made(config, (*overrides, f"model.recompute={recompute}"), gpus, gpu, mean_tokens)
            if layout is not None and (best is None or layout.step_s < best.step_s):
                best = layout
        if best is not None:
            found.append(best)
    return found, tried


def _ways(config: Config, gpus: int, context: int) -> Iterator[tuple[str, ...]]:
    mode = config.rollout.mode
    virtual = config.parallel.virtual_pipeline
    for tensor, pipeline, chunks in itertools.product(SIZES, SIZES, sorted({1, virtual})):
        block = tensor * pipeline * context
        if tensor > NODE_GPUS or gpus % block:
            continue
        split = (f"parallel.context={context}",) if context != config.parallel.context else ()
        trainer = (
            f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", *split, f"parallel.data={gpus // block}",
            f"parallel.sequence_parallel={'true' if tensor > 1 else 'false'}",
            *([f"parallel.virtual_pipeline={chunks}"] if virtual > 1 else []),
        )  # fmt: skip
        if mode == "server":
            yield trainer
            continue
        yield (*trainer, "rollout.mode=embedded", "rollout.tensor=1")
        for engine in SIZES:
            if engine <= min(NODE_GPUS, gpus) and not gpus % engine:
                yield (*trainer, "rollout.mode=colocated", f"rollout.tensor={engine}")


def _made(config: Config, overrides: tuple[str, ...], gpus: int, gpu: str, mean_tokens: float | None) -> Layout | None:
    """None where the model cannot be cut so, or it does not fit."""
    tree = config.model_dump()
    for override in overrides:
        apply_override(tree, override)
    try:
        estimate = estimate_on(gpu_called(gpu), parse_config(tree), gpus=gpus, mean_tokens=mean_tokens)
        require_fit(estimate, gpu)
    except ConfigError:
        return None
    return Layout(overrides, estimate)


def recommend(
    config: Config,
    *,
    gpus: int = NODE_GPUS,
    gpu: str = "h100-80g",
    mean_tokens: float | None = None,
    console: Console | None = None,
) -> None:
    """Prints the fastest layouts, what the first of them saves where, and its overrides on the last line.

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
    times = ("RL step, s", "rollout", "update", "reheating, s")
    for column in ("TP", "PP", "CP", "DP", "engines", "recompute", "GiB", *times):
        table.add_column(column, justify="right")
    for layout in choice[:SHOWN]:
        e = layout.estimate
        p, rollout = e.config.parallel, e.config.rollout
        engines = f"{e.num_engines} x TP{rollout.tensor}, {rollout.mode}"
        seconds = (layout.step_s, layout.phases["rollout"], layout.phases["update"], sum(e.reheat_step().values()))
        pipeline = f"{p.pipeline} x {p.virtual_pipeline}" if p.virtual_pipeline > 1 else p.pipeline
        row = (p.tensor, pipeline, p.context, e.data_size, engines, e.config.model.recompute, f"{layout.gib:.1f}")
        table.add_row(*map(str, row), *(f"{s:.3g}" for s in seconds))
    console.print(table)
    console.print(f"All figures are estimates. {_why(best, _own(config, gpus, gpu, mean_tokens))}", soft_wrap=True)
    console.print(" ".join(best.overrides), soft_wrap=True)


def _own(config: Config, gpus: int, gpu: str, mean_tokens: float | None) -> Layout | None:
    """The recipe's, where it is one for so many GPUs and fits."""
    return _made(config, (), gpus, gpu, mean_tokens)


def _why(best: Layout, own: Layout | None) -> str:
    if own is None:
        return "The recipe's own layout is for another number of GPUs, or does not fit."
    if math.isclose(own.step_s, best.step_s, rel_tol=0.01):
        return f"The recipe's own layout is as fast as any, to within 1%: {own.step_s:.3g} s a step."
    changes = {phase: own.phases[phase] - seconds for phase, seconds in best.phases.items()}
    parts = [f"{phase} {-saved:+.3g} s" for phase, saved in changes.items() if abs(saved) >= 0.005 * own.step_s]
    text = f"An RL step of the first takes {best.step_s:.3g} s, of the recipe's own layout {own.step_s:.3g}"
    return f"{text}: {', '.join(parts)}."
