"""One update's gradient, and the peak of what its tensors hold, by what is recomputed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from scripts.storage_counter import StorageCounter
from tests.distributed.cases import random_batch, running_engine


def recomputed(folder: Path) -> dict[str, dict[str, Any]]:
    from megatron_reheat.losses.reheat import sft_loss
    from megatron_reheat.types import TrainBatch

    batch = TrainBatch(tuple(s for seed in range(4) for s in random_batch(seed).sequences))
    found = {}
    for recompute in ("none", "selective", "full"):
        layout: dict[str, Any] = {
            "recompute": recompute,
            "microbatch_tokens": batch.num_tokens,
            "head_chunk_tokens": 16,
        }
        with running_engine(folder, **layout) as engine:
            engine.update(batch, sft_loss, lr=0.0, weight_decay=0.0)  # the optimizer's state is made at the first step
            with StorageCounter() as counter:
                engine.update(batch, sft_loss, lr=0.0, weight_decay=0.0)
            gradient = torch.cat([buffer.grad_data for chunk in engine._wrapped for buffer in chunk.buffers])
            found[recompute] = {"gradient": gradient.clone(), "peak": counter.peak}
    return found
