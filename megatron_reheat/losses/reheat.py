"""The reheating loss of TS-OPSD (arXiv 2606.00755, section 3) and the cross-entropy of the warm start."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_reheat.metrics import MetricSums
from megatron_reheat.parallel.packing import MicroBatch
from megatron_reheat.parallel.vocab import Direction, TemperedKL, Vocabulary

TEACHER = "teacher"  # the reading by frozen weights, where the teacher is not the policy itself


def reheat_loss(
    vocab: Vocabulary, micro: MicroBatch, *, teacher_temperature: float, direction: Direction
) -> tuple[Tensor, MetricSums]:
    """Token-mean KL between the policy and a flattened distribution on the policy's own rollouts: its own, as it is in this
    step, or that of the reading `TEACHER`, if there is one.

    The same pass gives the entropy the controller watches and the log-probabilities that are held against the sampler's;
    `rollout/mismatch_kl` is what `rollout.weight_sync.mismatch` computes.
    """
    kl, entropy, teacher_entropy, logprobs = _distilled(vocab, micro, teacher_temperature, direction)
    assert logprobs is not None
    counted = micro.loss_mask.bool()
    loss = torch.where(counted, kl, 0.0).mul(micro.loss_weights).sum()

    # float64: of two nearly equal policies, float32 leaves nothing of e^r - 1 - r
    gap = torch.where(counted, logprobs - micro.rollout_logprobs, 0.0).double()
    rows = {
        "reheat/kl": kl.detach(),
        "reheat/teacher_entropy": teacher_entropy,
        "entropy/mean": entropy,
        "rollout/mismatch_kl": torch.expm1(gap) - gap,
        "rollout/mismatch_abs_mean": gap.abs(),
    }
    totals = torch.stack([torch.where(counted, row, 0.0).sum(dtype=torch.float64) for row in rows.values()]).tolist()
    count = int(counted.sum())
    metrics = MetricSums()
    for name, total in zip(rows, totals, strict=True):
        metrics.add_mean(name, total, count)
    if count:
        metrics.add_max("rollout/mismatch_abs_max", float(gap.abs().max()))
    return loss, metrics


def _distilled(vocab: Vocabulary, micro: MicroBatch, temperature: float, direction: Direction) -> TemperedKL:
    teacher = micro.readings.get(TEACHER)
    if teacher is None:
        return vocab.tempered_kl(temperature=temperature, direction=direction, targets=micro.targets)
    flattened = teacher.flattened(temperature)
    with torch.no_grad():
        teacher_entropy = flattened.logprobs(micro.targets).entropy
        logprobs, entropy = vocab.logprobs(micro.targets)
    return TemperedKL(vocab.kl_to(flattened, direction=direction), entropy, teacher_entropy, logprobs)


def sft_loss(vocab: Vocabulary, micro: MicroBatch) -> tuple[Tensor, MetricSums]:
    """Token-mean cross-entropy of the worked answers."""
    logprobs, entropy = vocab.logprobs(micro.targets)
    counted = micro.loss_mask.bool()
    loss = -torch.where(counted, logprobs, 0.0).mul(micro.loss_weights).sum()
    count = int(counted.sum())
    metrics = MetricSums()
    metrics.add_sum("sft/loss", float(loss.detach()))
    metrics.add_mean("entropy/mean", float(torch.where(counted, entropy.detach(), 0.0).sum()), count)
    return loss, metrics
