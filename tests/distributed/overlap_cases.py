"""Updates with gradients that are summed during the backward pass, and after it."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from tests.distributed.cases import random_batch, running_engine


def both_ways(runs: list[tuple[Path, dict[str, Any]]]) -> list[dict[bool, dict[str, Any]]]:
    """For each model and layout the same updates, by whether they overlap."""
    return [{overlap: _updates(folder, overlap, **layout) for overlap in (False, True)} for folder, layout in runs]


def _updates(folder: Path, overlap: bool, bucket: int | None = None, **layout: Any) -> dict[str, Any]:
    """Scored before and in the update, whole sequences, rejected, with a tapped layer, and where a rank has no sequence."""
    from megatron_reheat.losses.policy_gradient import policy_loss
    from megatron_reheat.losses.reheat import reheat_loss, sft_loss
    from megatron_reheat.model import engine as module
    from megatron_reheat.types import TrainBatch

    grpo = partial(
        policy_loss,
        sampling_temperature=0.9,
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=3.0,
        tis_cap=2.0,
        entropy_coef=0.01,
    )
    reheat = partial(reheat_loss, teacher_temperature=1.2, direction="forward")

    def tapped(vocab: Any, micro: Any) -> tuple[Tensor, Any]:
        value, sums = sft_loss(vocab, micro)
        return value + (micro.readings["layer1"].js_to(vocab) * micro.loss_weights).sum(), sums

    taps: dict[str, Any] = {"taps": (1,)} if layout.get("fused_head", True) else {}
    made = module.ddp_config

    def cut(*arguments: Any) -> Any:
        return dataclasses.replace(made(*arguments), bucket_size=bucket)

    with (
        mock.patch.object(module, "ddp_config", cut),
        running_engine(folder, overlap_grad_reduce=overlap, microbatch_tokens=48, **layout) as engine,
    ):
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
