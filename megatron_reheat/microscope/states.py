"""One policy in memory, run by transformers: the states behind every layer, at the positions that predict a response."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from megatron_reheat.microscope.probe import ProbeSequence


class States(NamedTuple):
    """Of one sequence, row i predicting token i of its response.

    `final` [n, H] is what the LM head reads; `layers` are [k, H] at k chosen rows: the embedding's output, each layer's, and
    the final norm's. Without a chosen row in the batch there are none.
    """

    final: Tensor
    layers: list[Tensor]


class StateReader:
    """The model of a Hugging Face folder that was checked: in bfloat16 on a GPU where there is one, else float32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        disable_progress_bar()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self._model = model.to(self.device).eval()

    @property
    def head(self) -> Tensor:
        """[V, H] the LM head's weight, which is the embedding's where they are tied."""
        return self._model.lm_head.weight.detach()

    @torch.no_grad()
    def states(self, batch: Sequence[ProbeSequence], chosen: Sequence[Tensor]) -> list[States]:
        """`chosen` [k] int64 are, for each sequence, the rows whose layers' states are wanted."""
        layers: list[list[Tensor]] = [[] for _ in batch]
        # the state at a position predicts the token behind it
        firsts = [len(sequence.prompt) - 1 for sequence in batch]
        wanted = [(rows + first).to(self.device) for rows, first in zip(chosen, firsts, strict=True)]

        def keep(_: torch.nn.Module, __: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            for i, rows in enumerate(wanted):
                layers[i].append(states[i, rows])

        network = self._model.model
        modules = [network.embed_tokens, *network.layers, network.norm] if any(map(len, wanted)) else []
        hooks = [module.register_forward_hook(keep) for module in modules]
        try:
            final = network(input_ids=_padded(batch).to(self.device), use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        return [
            States(final[i, first : len(sequence) - 1], layers[i])
            for i, (sequence, first) in enumerate(zip(batch, firsts, strict=True))
        ]


def _padded(batch: Sequence[ProbeSequence]) -> Tensor:
    """[S, L] on the right, where attention is causal: no token sees it."""
    tokens = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64)
    for row, sequence in zip(tokens, batch, strict=True):
        row[: len(sequence)] = torch.tensor([*sequence.prompt, *sequence.response])
    return tokens


def release_memory() -> None:
    """Of a policy that nothing refers to any more: a model may refer to itself."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reading_names(num_layers: int) -> list[str]:
    """What the entries of `States.layers` are called."""
    return ["embedding", *(f"layer {i}" for i in range(1, num_layers + 1)), "final norm"]
