"""A small batch with every region of the ratio in it, and what a method's own loss makes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_reheat.methods.grpo import GRPO
from megatron_reheat.parallel.packing import make_microbatches
from megatron_reheat.parallel.vocab import VocabLogits
from megatron_reheat.recipe import parse_config
from megatron_reheat.types import At, Scores, TrainBatch, TrainSequence
from tests.unit.methods.builders import make

VOCAB = 30
TEMPERATURE = 0.8
AT = At(step=1, rl_step=1, stage_step=0, temperature=TEMPERATURE, seed=3)
ALIGNMENT = 8


def make_method(name: str, options: dict[str, Any] | None = None, **rl: Any) -> GRPO:
    """
    Raises:
        ConfigError: the method refuses it.
    """
    tree = {"model": {"hf_path": "-"}, "data": {"path": "-"}, "rl": {"method": name, "options": options or {}, **rl}}
    return make(parse_config(tree))


@dataclass(frozen=True)
class Case:
    """`batch` is as `weigh` gets it, `scores` what the trainer scored; `logits` [T, V] those of the update, packed in order."""

    batch: TrainBatch
    scores: Scores
    logits: Tensor

    def logprobs(self) -> tuple[Tensor, list[Tensor]]:
        """The logits in float64 as a leaf, and of each sequence the log-probabilities [R] that come from them."""
        dense, rows, start = self.logits.double().requires_grad_(), [], 0
        for s in self.batch.sequences:
            targets = torch.from_numpy(s.token_ids[s.num_prompt_tokens :].astype(np.int64))
            places = torch.arange(start + s.num_prompt_tokens - 1, start + len(s.token_ids) - 1)
            rows.append((dense / TEMPERATURE).log_softmax(-1)[places, targets])
            start += len(s.token_ids)
        return dense, rows


def make_case(spread: float = 0.4, num_sequences: int = 6) -> Case:
    """`spread`: of the log-ratios between the policy of now and of old; they are half of that between trainer and sampler."""
    generator = np.random.default_rng(0)
    # the longest first, as the packing lays them
    sequences = tuple(
        TrainSequence(generator.integers(0, VOCAB, 12 - i).astype(np.int32), 2, float(generator.normal()))
        for i in range(num_sequences)
    )
    total = sum(len(s.token_ids) for s in sequences)
    case = Case(
        TrainBatch(sequences), Scores([], []), torch.randn(total, VOCAB, generator=torch.Generator().manual_seed(0))
    )
    now = [row.detach().float().numpy() for row in case.logprobs()[1]]
    old = [row + generator.normal(0, spread, row.shape).astype(np.float32) for row in now]
    sampled = [row + generator.normal(0, spread / 2, row.shape).astype(np.float32) for row in old]
    batch = TrainBatch(tuple(replace(s, rollout_logprobs=row) for s, row in zip(sequences, sampled, strict=True)))
    entropies = [np.full(len(row), 0.15, np.float32) for row in old]
    return replace(case, batch=batch, scores=Scores(old, entropies))


def run(method: GRPO, case: Case) -> tuple[float, Tensor, dict[str, float], TrainBatch]:
    """Loss, its gradient [T, V] in float64, its metrics, and the batch as the method weighed it."""
    batch = method.weigh(case.batch, case.scores, scoring=None)
    options = {"data_rank": 0, "data_size": 1, "microbatch_tokens": 1000, "alignment": ALIGNMENT}
    (micro,) = make_microbatches(batch, aggregation=method.config.rl.aggregation, **options)
    assert micro.sequence_indices == tuple(range(len(batch)))
    padding = torch.full((len(micro.tokens) - len(case.logits), VOCAB), 3.0)
    z = torch.cat([case.logits, padding]).requires_grad_()
    loss, metrics = method.loss(AT)(VocabLogits(z, VOCAB), micro)
    loss.backward()
    return loss.item(), z.grad[: len(case.logits)].double(), metrics.reduced(), batch


def check(loss: float, gradient: Tensor, expected: Tensor, dense: Tensor) -> None:
    """`expected` is a scalar of the leaf `dense`."""
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    torch.testing.assert_close(gradient, dense.grad, rtol=1e-4, atol=1e-7)


def columns(case: Case, old: str = "old") -> list[tuple[Tensor, Tensor, float]]:
    """Of each sequence in float64: log-probabilities before, the sampler's, and the advantage."""
    return [
        (torch.from_numpy(o).double(), torch.from_numpy(s.rollout_logprobs).double(), float(s.advantage))
        for o, s in zip(case.scores.logprobs, case.batch.sequences, strict=True)
    ]
