"""The part of the network that is on one rank: consecutive layers or, with virtual pipeline stages, several chunks of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class ModelChunks:
    """In the order in which a token passes them: between two of them it visits every other pipeline rank.

    A parameter is named as by Megatron, with its layer counted from 0 over the whole model.
    """

    models: tuple[GPTModel, ...]

    @property
    def config(self) -> TransformerConfig:
        """The same for all chunks, and of the whole model."""
        config: TransformerConfig = self.models[0].config
        return config

    @property
    def last(self) -> GPTModel:
        """Which ends with the head on the last pipeline stage."""
        return self.models[-1]

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Of all chunks, none of whose names is another's."""
        for part in self.parameters_by_chunk():
            yield from part.items()

    def parameters_by_chunk(self) -> list[dict[str, torch.nn.Parameter]]:
        """By name."""
        return [{_global_name(m, name): p for name, p in m.named_parameters()} for m in self.models]

    def sharded_state_dict(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Megatron's, of each chunk; what of it is in a checkpoint does not depend on how the model is cut."""
        return {f"chunk{i}": m.sharded_state_dict(metadata=metadata) for i, m in enumerate(self.models)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The same with loaded tensors in it."""
        for i, model in enumerate(self.models):
            model.load_state_dict(state[f"chunk{i}"])


def _global_name(model: GPTModel, name: str) -> str:
    """Megatron counts a module's layers from 0 in every chunk, and `layer_number` from 1 over the whole model."""
    if (layer := _LAYER.fullmatch(name)) is None:
        return name
    return f"decoder.layers.{model.decoder.layers[int(layer[1])].layer_number - 1}.{layer[2]}"
