"""Every method on batches that are seldom, of groups all right or all wrong or of none at all; and its loss on parts of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_reheat.clock import Clock
from megatron_reheat.errors import ConfigError
from megatron_reheat.methods import METHODS
from megatron_reheat.methods.grpo import GRPO
from megatron_reheat.metrics import MetricSums
from megatron_reheat.parallel.packing import MicroBatch, make_microbatches
from megatron_reheat.parallel.vocab import VocabLogits
from megatron_reheat.types import POLICY, Collected, Completion, Group, Prompt, Reward, Scores, TrainBatch
from tests.unit.methods.builders import at, make_any

VOCAB = 30
SIZE = 4  # completions of a prompt
RIGHT, WRONG, MIXED = [1.0] * SIZE, [0.0] * SIZE, [1.0, 0.0, 0.0, 1.0]
BATCHES = {
    "mixed": [MIXED, MIXED[::-1], [0.0, 0.0, 0.0, 1.0], MIXED],
    "uniform": [RIGHT, WRONG, RIGHT, WRONG],
    "one group": [[0.0, 1.0, 0.0, 0.0]],
    "nothing to train on": [RIGHT, WRONG],
}
# short schedules, and what has a term of its own
OPTIONS = {
    "s2l_po": {"mix_steps": 3},
    "sdpg": {"beta": 0.5, "alpha": 0.2, "warmup_steps": 0, "decay_steps": 5},
    "clip_cov": {"low": 0.0, "high": 9.0},
    "kl_cov": {"fraction": 0.2},
}

# what trains on more than advantages, or gives such groups one: anchors, penalties, further samples
TEACHES_MORE = {"avspo", "kl_cov", "s2l_po", "scope", "sdpg"}


class Sampling:
    """Gives groups of responses of one to six tokens, and of what is sampled again every second one right."""

    def __init__(self, rewards: Sequence[Sequence[float]], *, keeps_all: bool) -> None:
        self.rewards, self.keeps_all = rewards, keeps_all
        self.generator = np.random.default_rng(3)

    def collect(self, at: Any, clock: Any, *, group_size: int, complete: Any = None) -> Collected:
        prompts = [Prompt(i, "", (1, i + 2), {}) for i in range(len(self.rewards))]
        first = [self.group(p, row[:group_size], at.temperature) for p, row in zip(prompts, self.rewards, strict=True)]
        completed = complete(first) if complete else first
        return Collected([g for g in completed if self.keeps_all or 0 < g.accuracy < 1], first, [], {})

    def again(self, prompts: Any, n: int, temperature: float, clock: Any, *, sampler: str = POLICY, top_p: float = 1.0):
        return [self.group(p, [float(i % 2) for i in range(n)], temperature, sampler) for p in prompts]

    def group(self, prompt: Prompt, rewards: Sequence[float], temperature: float, sampler: str = POLICY) -> Group:
        lengths = [1 + (prompt.index + i) % 6 for i in range(len(rewards))]
        completions = tuple(
            Completion(self.tokens(n), self.logprobs(n), temperature, 0, "stop", sampler) for n in lengths
        )
        return Group(prompt, completions, tuple(Reward(r, r > 0) for r in rewards))

    def tokens(self, count: int) -> np.ndarray:
        return self.generator.integers(2, VOCAB, count).astype(np.int32)

    def logprobs(self, count: int) -> np.ndarray:
        return -self.generator.exponential(1.0, count).astype(np.float32)


class Scoring:
    def __init__(self, at: Any, draw: Any) -> None:
        self.at, self.draw = at, draw

    def score(self, batch: TrainBatch) -> Scores:
        lengths = [s.num_response_tokens for s in batch.sequences]
        return Scores([self.draw(n) for n in lengths], [-self.draw(n) for n in lengths])

    reference = score


def logits(batch: TrainBatch, indices: Sequence[int], seed: int) -> Tensor:
    """The same of a sequence wherever it is."""
    rows = [
        torch.randn(len(batch.sequences[i].token_ids), VOCAB, generator=torch.Generator().manual_seed(100 * seed + i))
        for i in indices
    ]
    return torch.cat(rows) if rows else torch.zeros(1, VOCAB)  # a micro-batch of padding alone


def summed(method: GRPO, batch: TrainBatch, at: Any, *, ranks: int, tokens: int) -> tuple[float, list[Tensor], dict]:
    """The loss over all ranks and micro-batches, its gradient by sequence, and its metrics."""
    total, gradients, metrics, views = 0.0, [torch.zeros(0)] * len(batch), [], method.views(batch)
    for rank in range(ranks):
        options: dict[str, Any] = {"data_rank": rank, "data_size": ranks, "microbatch_tokens": tokens, "alignment": 1}
        micros = make_microbatches(
            batch, aggregation=method.config.rl.aggregation, beside=list(views.values()), **options
        )
        for micro in micros:
            z = logits(batch, micro.sequence_indices, 1).requires_grad_()
            loss, sums = method.loss(at)(VocabLogits(z, VOCAB), with_readings(method, batch, micro, views))
            loss.backward()
            total, metrics = total + loss.item(), [*metrics, sums]
            lengths = [len(batch.sequences[i].token_ids) for i in micro.sequence_indices]
            assert z.grad is not None
            for i, gradient in zip(micro.sequence_indices, z.grad[: sum(lengths)].split(lengths), strict=True):
                gradients[i] = gradient
    return total, gradients, MetricSums.merged(metrics).reduced()


def with_readings(method: GRPO, batch: TrainBatch, micro: MicroBatch, views: Any) -> MicroBatch:
    """As the engine gives them: of what a view leaves out, zero."""
    readings = {f"layer{n}": logits(batch, micro.sequence_indices, 2 + n) for n in method.taps}
    for name, view in views.items():
        rows = [logits(batch, [i], 9) * (len(view.sequences[i].token_ids) > 0) for i in micro.sequence_indices] or [
            torch.zeros(1, VOCAB)
        ]
        readings[name] = torch.cat(rows)
    return replace(micro, readings={name: VocabLogits(z, VOCAB) for name, z in readings.items()})


def made(name: str) -> GRPO:
    """With two minibatches a step where that is possible."""
    sizes: dict[str, Any] = {"prompts_per_step": 4, "group_size": SIZE, "dynamic_sampling": False}
    options = {"options": OPTIONS[name]} if name in OPTIONS else {}
    try:
        method = make_any(name, {"max_tokens": 8}, **sizes, minibatch_prompts=2, **options)
    except ConfigError:
        method = make_any(name, {"max_tokens": 8}, **sizes, **options)

    def hinted(prompt: Prompt, solution: str | None) -> np.ndarray | None:
        return None if prompt.index == 2 else np.full(3 + prompt.index, 1, np.int32)

    method.tools = replace(method.tools, hinted_prompt=hinted)
    return method


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", [name for name in METHODS if name != "oger"])  # which reads files of its own
def test_a_step_is_finite_and_the_same_however_it_is_cut(name: str, batch: str) -> None:
    method, where = made(name), at(entropy=0.3, step=2)
    sampling = Sampling(BATCHES[batch], keeps_all=batch != "nothing to train on")
    collected = method.collect(sampling, where, Clock())  # type: ignore[arg-type]
    trained = method.batch(collected, where)
    assert bool(trained.sequences) == (bool(collected.groups) or bool(collected.extra))
    if not trained.sequences:
        assert method.state() == made(name).state()
        return
    scoring = Scoring(where, sampling.logprobs)
    trained = method.weigh(trained, scoring.score(trained), scoring)  # type: ignore[arg-type]
    assert all(np.isfinite(value) for value in method.metrics().values())
    minibatches = trained.minibatches((method.config.rl.minibatch_prompts or 4) * SIZE)
    assert sum(map(len, minibatches)) == len(trained)
    teaches = False
    for minibatch in minibatches:
        whole = summed(method, minibatch, where, ranks=1, tokens=1000)
        cut = summed(method, minibatch, where, ranks=3, tokens=20)
        assert np.isfinite(whole[0]) and cut[0] == pytest.approx(whole[0], rel=1e-5, abs=1e-6)
        for ours, theirs in zip(cut[1], whole[1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        assert cut[2] == pytest.approx(whole[2], rel=1e-4, abs=1e-6)
        teaches |= any(bool(gradient.any()) for gradient in whole[1])
    assert teaches == (batch != "uniform" or name in TEACHES_MORE)
