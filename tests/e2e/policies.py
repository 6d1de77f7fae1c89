"""Tiny policies that get some answers right, so that groups are mixed and RL has a gradient. Trained here, in seconds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100  # transformers' label of positions without a loss


def imitate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[tuple[str, str]],
    *,
    steps: int,
    lr: float = 5e-3,
    batch_size: int = 32,
) -> float:
    """Cross-entropy on (prompt, response) pairs, end of sequence included; returns the last loss."""
    rows = [_row(tokenizer, prompt, response) for prompt, response in examples]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    loss = torch.zeros(())
    for step in range(steps):
        chosen = [rows[i] for i in torch.randint(len(rows), (batch_size,), generator=generator)]
        ids = torch.nn.utils.rnn.pad_sequence([r[0] for r in chosen], batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence([r[1] for r in chosen], batch_first=True, padding_value=IGNORED)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10) * (1 - step / steps)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def _row(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> tuple[Tensor, Tensor]:
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor([*before, *after]), torch.tensor([IGNORED] * len(before) + after)
