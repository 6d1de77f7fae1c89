"""The last stage without Megatron's logits: the model ends at its hidden states, and the losses apply the LM head."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

QueriesAndKeys = tuple[Tensor, Tensor]


class HeadlessGPTModel(GPTModel):
    """A GPTModel whose last stage returns hidden states after the final norm, [T, 1, H]; its parameters stay the same.

    While `taps` names layers before the last, counted from 1, the states behind these are returned, too, read through the
    final norm as well: [(1 + K) T, 1, H], the policy's own first. While `attention_taps` does, the last stage finds in
    `attended` what enters these layers' softmax: queries [T, heads/TP, d] and keys [T, groups/TP, d]. All of it travels along
    the pipeline with the hidden states, so that its gradient comes back to the stage that made it. Full recomputation keeps
    what a layer is given, which is what the one before it has made, but throws away its inside: `attention_taps` need another
    setting.
    """

    taps: tuple[int, ...] = ()
    attention_taps: tuple[int, ...] = ()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.attended: dict[int, QueriesAndKeys] = {}
        self._tapped: list[Tensor] = []
        self._received: Tensor | None = None
        self._is_listening = False  # not while the backward pass repeats a core attention
        for layer in self.decoder.layers[1:]:
            layer.register_forward_pre_hook(self._tap, with_kwargs=True)
        for layer in self.decoder.layers:
            attention = layer.self_attention.core_attention
            attention.register_forward_pre_hook(partial(self._tap_attention, layer.layer_number))

    def _tap(self, layer: Any, inputs: Any, options: Any) -> None:
        if self._is_listening and layer.layer_number - 1 in self.taps:
            self._tapped.append(inputs[0] if inputs else options["hidden_states"])

    def _tap_attention(self, number: int, _: torch.nn.Module, inputs: Any) -> None:
        if self._is_listening and number in self.attention_taps:
            self.attended[number] = inputs[0], inputs[1]

    def set_input_tensor(self, input_tensor: Any) -> None:
        (self._received,) = input_tensor if isinstance(input_tensor, list) else [input_tensor]

    def forward(self, input_ids: Tensor, *arguments: Any, **options: Any) -> Tensor:
        self._tapped, self.attended = [], {}
        hidden = self._received
        if hidden is not None and (self.taps or self.attention_taps):
            hidden = self._unload(hidden, input_ids.size(-1))
        super().set_input_tensor(hidden)
        self._received, self._is_listening = None, True
        try:
            return super().forward(input_ids, *arguments, **options)
        finally:
            self._is_listening = False

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        tapped, self._tapped = self._tapped, []
        if self.post_process:
            tapped = [self.decoder.final_layernorm(states) for states in tapped]
        else:
            tapped += [hidden_states] if self.decoder.layers[-1].layer_number in self.taps else []
            tapped += [_as_rows(*self.attended[n], hidden_states.size(-1)) for n in sorted(self.attended)]
            self.attended = {}
        return torch.cat([hidden_states, *tapped]) if tapped else hidden_states

    def _unload(self, received: Tensor, num_tokens: int) -> Tensor:
        """The hidden states of what an earlier stage has sent; the rest is kept for the next one."""
        config, first = self.config, self.decoder.layers[0].layer_number
        tensor, width = config.tensor_model_parallel_size, received.size(-1)
        heads, groups = config.num_attention_heads // tensor, config.num_query_groups // tensor
        layers = sorted(n for n in self.attention_taps if n < first)
        num_states = 1 + sum(n < first for n in self.taps)
        rows = num_tokens // tensor if config.sequence_parallel else num_tokens
        rows_of_attention = -(-num_tokens * (heads + groups) * config.kv_channels // width)
        hidden, *rest = received.split([rows] * num_states + [rows_of_attention] * len(layers))
        self._tapped = rest[: num_states - 1]
        for number, packed in zip(layers, rest[num_states - 1 :], strict=True):
            self.attended[number] = _of_rows(packed, num_tokens, heads, groups, config.kv_channels)
        return hidden


def _as_rows(queries: Tensor, keys: Tensor, width: int) -> Tensor:
    """-> [n, 1, width], padded at the end."""
    flat = torch.cat([queries.flatten(), keys.flatten()])
    return torch.nn.functional.pad(flat, (0, -len(flat) % width)).view(-1, 1, width)


def _of_rows(rows: Tensor, num_tokens: int, heads: int, groups: int, channels: int) -> QueriesAndKeys:
    """Inverse of `_as_rows`."""
    queries, keys, _ = rows.flatten().tensor_split(
        (num_tokens * heads * channels, num_tokens * (heads + groups) * channels)
    )
    return queries.view(num_tokens, heads, channels), keys.view(num_tokens, groups, channels)


def head_weight(model: GPTModel) -> Tensor:
    """[V/TP, H] this rank's shard of the LM head, which is the embedding's where they are tied."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def head_input(hidden: Tensor, *, sequence_parallel: bool) -> Tensor:
    """[T or T/TP, 1, H] -> [T, H] on every tensor-parallel rank; backward sums the ranks' gradients."""
    if sequence_parallel:
        return gather_from_sequence_parallel_region(hidden)[:, 0]
    return copy_to_tensor_model_parallel_region(hidden)[:, 0]
