"""OISD (arXiv 2605.29089): an intermediate layer learns from the last one, in what it predicts and in how it attends."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from megatron_reheat.metrics import MetricSums
from megatron_reheat.parallel.attention import Attention, Positions
from megatron_reheat.parallel.packing import Loss, MicroBatch
from megatron_reheat.parallel.vocab import Vocabulary


def think_loss(
    vocab: Vocabulary,
    micro: MicroBatch,
    *,
    policy: Loss,
    layer: int,
    temperature: float,
    coef: float,
    advantage_clip: float,
) -> tuple[Tensor, MetricSums]:
    """`policy` + coef x the mean over sequences of the mean over their tokens of clip(A) JS(layer, last layer).

    The last layer is detached. Both predictions are taken at `temperature`; the metrics `oisd/think_js` (which saturates at
    ln 2 = 0.693) and `oisd/layer_entropy` (at temperature 1, both in nats) are token means.
    """
    loss, metrics = policy(vocab, micro)
    student, counted = micro.readings[f"layer{layer}"], micro.loss_mask.bool()
    js = student.js_to(vocab, temperature=temperature)
    signed = micro.advantages.clamp(-advantage_clip, advantage_clip) * js
    # where, not multiplication: what padding positions hold must not reach the sum, whatever it is
    term = torch.where(counted, signed, 0.0).mul(micro.sequence_weights).sum()
    with torch.no_grad():
        entropy = student.logprobs(micro.targets).entropy
        rows = {"oisd/think_js": js, "oisd/layer_entropy": entropy}
        for name, row in rows.items():
            total = torch.where(counted, row, 0.0).sum(dtype=torch.float64)
            metrics.add_mean(name, float(total), int(counted.sum()))
    metrics.add_mean("oisd/think_loss", float(term.detach()), float(micro.sequence_weights.sum()))
    return loss + coef * term, metrics


def attention_loss(
    attended: Mapping[int, Attention],
    micro: MicroBatch,
    *,
    layer: int,
    last_layer: int,
    coef: float,
    advantage_clip: float,
    queries: int,
    window: int,
    stride: int,
) -> tuple[Tensor, MetricSums]:
    """coef x the mean over sequences of the mean over their sampled queries of clip(A) JS(layer, last layer), which itself is
    the mean over heads; the last layer is detached. See `sample_positions`."""
    positions, weights = sample_positions(micro, queries=queries, window=window, stride=stride)
    js = attended[layer].js_to(attended[last_layer], positions)
    signed = micro.advantages[positions.queries].clamp(-advantage_clip, advantage_clip) * js
    term = signed.mul(weights).sum()
    metrics = MetricSums()
    metrics.add_mean("oisd/attention_js", float(js.detach().sum(dtype=torch.float64)), len(js))
    metrics.add_mean("oisd/attention_loss", float(term.detach()), float(weights.sum()))
    return coef * term, metrics


def sample_positions(micro: MicroBatch, *, queries: int, window: int, stride: int) -> tuple[Positions, Tensor]:
    """At most `queries` positions of every sequence, evenly spaced over those that predict its response; for each as keys the
    last `window` positions up to itself, and before these every `stride`-th of the sequence from its first on.

    Returns:
        The positions, and [Q] float32 the queries' shares: every sequence's add up to what its tokens' `sequence_weights` do.
    """
    counted = micro.loss_mask.bool().cpu().numpy()
    chosen, starts, shares = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    for start, end in pairwise(micro.cu_seqlens.tolist()):
        predicting = start + np.flatnonzero(counted[start:end])
        num = min(queries, len(predicting))
        if num:
            middles = (2 * np.arange(num) + 1) * len(predicting) // (2 * num)
            chosen.append(predicting[middles])
            starts.append(np.full(num, start))
            shares.append(np.full(num, len(predicting) / num, np.float32))
    query, start = np.concatenate(chosen), np.concatenate(starts)
    offset = (query - start)[:, None]
    farthest = int(offset.max(initial=0))
    local = offset - np.arange(min(window, farthest + 1))
    strided = np.arange(0, farthest - window + 1, stride) + np.zeros_like(offset)
    keys, valid = np.hstack([local, strided]), np.hstack([local >= 0, strided <= offset - window])
    keys = start[:, None] + np.where(valid, keys, offset)
    rows = (torch.from_numpy(row).to(micro.loss_mask.device) for row in (query, keys, valid, np.concatenate(shares)))
    query_rows, key_rows, valid_rows, share_rows = rows
    return Positions(query_rows, key_rows, valid_rows), share_rows * micro.sequence_weights[query_rows]
