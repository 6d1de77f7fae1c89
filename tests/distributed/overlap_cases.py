"""Updates with gradients that are summed during the backward pass, and after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.distributed.cases import GRPO, random_batch, running_engine, world_size


def both_ways(runs: list[tuple[Path, dict[str, Any]]]) -> list[dict[bool, dict[str, Any]]]:
    """For each model and layout the same updates, by whether they overlap."""
    return [{overlap: _updates(folder, overlap, **layout) for overlap in (False, True)} for folder, layout in runs]


def both_ways_and_resumed(runs: list[tuple[Path, dict[str, Any]]], checkpoints: Path) -> tuple[Any, Any]:
    """Besides, on two ranks: losses after a checkpoint, of an engine without overlap that has one bucket, and of the one that
    saved it, whose snapshot puts its weights back."""
    from megatron_reheat.losses.reheat import sft_loss
    from megatron_reheat.model.checkpoint import load_checkpoint
    from megatron_reheat.model.checkpoint_save import save_checkpoint

    def losses(engine: Any, seeds: range) -> list[float]:
        updates = (engine.update(random_batch(seed), sft_loss, lr=1e-2, weight_decay=0.01) for seed in seeds)
        return [update.metrics["sft/loss"] for update in updates]

    if world_size() != 2:
        return both_ways(runs), None
    layout: dict[str, Any] = {"data": 2, "dtype": "bfloat16"}
    with _cut(3000), running_engine(runs[0][0], overlap_grad_reduce=True, **layout) as engine:
        losses(engine, range(40, 43))
        saved = save_checkpoint(engine, checkpoints, 3, {}, keep=1)
        before, weights = engine.snapshot(), [p.clone() for _, p in engine.module.named_parameters()]
        expected = losses(engine, range(43, 45))
        engine.restore(before)
        parameters = dict(engine.module.named_parameters())
        for weight, restored in zip(weights, parameters.values(), strict=True):
            assert torch.equal(restored, weight)
        for name, part in engine.masters.part(parameters).items():
            assert torch.equal(before[name].to(part), part)
    with running_engine(runs[0][0], **layout) as engine:
        load_checkpoint(engine, saved)
        resumed = losses(engine, range(43, 45))
    return both_ways(runs), [resumed, expected]


@contextmanager
def _cut(bucket: int | None) -> Iterator[None]:
    """Gradients are cut into buckets of so many parameters."""
    from megatron_reheat.model import engine

    made = engine.ddp_config

    def cut(*arguments: Any) -> Any:
        return dataclasses.replace(made(*arguments), bucket_size=bucket)

    with mock.patch.object(engine, "ddp_config", cut):
        yield


def _updates(folder: Path, overlap: bool, bucket: int | None = None, **layout: Any) -> dict[str, Any]:
    """Scored before and in the update, whole sequences, rejected, with a tapped layer, and where a rank has no sequence."""
    from megatron_reheat.losses.policy_gradient import policy_loss
    from megatron_reheat.losses.reheat import reheat_loss, sft_loss
    from megatron_reheat.types import TrainBatch

    grpo = partial(policy_loss, **GRPO)
    reheat = partial(reheat_loss, teacher_temperature=1.2, direction="forward")

    def tapped(vocab: Any, micro: Any) -> tuple[Tensor, Any]:
        value, sums = sft_loss(vocab, micro)
        return value + (micro.readings["layer1"].js_to(vocab) * micro.loss_weights).sum(), sums

    taps: dict[str, Any] = {"taps": (1,)} if layout.get("fused_head", True) else {}
    layout = {"overlap_grad_reduce": overlap, "microbatch_tokens": 48, **layout}
    with _cut(bucket), running_engine(folder, **layout) as engine:
        early = _watch(engine)
        history = []
        for step, (loss, options) in enumerate(
            [
                (grpo, {}),
                (grpo, {"score": True}),
                (reheat, {"whole_sequences": True}),
                (grpo, {"score": True, "accept": lambda metrics, scores: False}),
                (tapped if taps else sft_loss, taps),
                (reheat, {}),
                (grpo, {"score": True}),
            ]
        ):
            batch = random_batch(seed=30 + step)
            if loss is reheat and not options:
                batch = TrainBatch(batch.sequences[:1])
            if loss is grpo and not options:
                scores = engine.score(batch, temperature=0.9)
                batch = batch.with_old_logprobs([lp - 0.1 for lp in scores.logprobs])
            result = engine.update(batch, loss, lr=1e-2, weight_decay=0.01, **options)
            history.append((result.applied, result.metrics))
        weights = {n: t.cpu().clone() for n, t in engine.iter_hf_weights()}
        return {"history": history, "weights": weights, "early": early}


def _watch(engine: Any) -> list[list[bool]]:
    """For each of the engine's buckets, of each update to come, whether its sum is on its way when the backward pass ends."""
    found = []
    for group in (group for chunk in engine._wrapped for group in chunk.bucket_groups):
        early: list[bool] = []

        def finish(
            group: Any = group, early: list[bool] = early, finish: Any = group.finish_grad_sync, **kw: Any
        ) -> None:
            early.append(group.grad_reduce_handle is not None)
            finish(**kw)

        group.finish_grad_sync = finish
        found.append(early)
    return found
