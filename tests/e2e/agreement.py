"""A transformers model whose weights go to an engine, which must then sample greedily what the model would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_reheat.rollout.rollout_engine import RolloutEngine
from megatron_reheat.rollout.weight_sync import WeightSync
from megatron_reheat.types import SamplingParams

TOLERANCE = 1e-3
GREEDY = SamplingParams(temperature=0.0, max_tokens=20)


class PushedModel:
    """`version` is that of the last push; a subclass sets the other two."""

    model: Any
    sync: WeightSync
    version = 0

    @torch.no_grad()
    def randomize(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.1 if parameter.dim() > 1 else 1 + noise * 0.1)

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        return [(name, parameter.detach()) for name, parameter in self.model.named_parameters()]

    def push(self, tensors=None):
        self.version += 1
        return self.sync.push(self.tensors() if tensors is None else tensors, self.version)

    @torch.no_grad()
    def logits(self, prompt, completion) -> torch.Tensor:
        sequence = torch.tensor([[*prompt, *completion.token_ids.tolist()]])
        return self.model(sequence).logits[0, len(prompt) - 1 : -1]

    def assert_samples_alike(self, engine: RolloutEngine, prompts: Sequence[Sequence[int]]) -> None:
        for prompt, (completion,) in zip(prompts, engine.generate(prompts, GREEDY, n=1, seed=0), strict=True):
            logits = self.logits(prompt, completion)
            assert completion.token_ids.tolist() == logits.argmax(-1).tolist()
            expected = logits.log_softmax(-1).max(-1).values.numpy()
            assert np.abs(completion.rollout_logprobs - expected).max() <= TOLERANCE
            assert completion.policy_version == self.version
            assert completion.sampling_temperature == 0.0
