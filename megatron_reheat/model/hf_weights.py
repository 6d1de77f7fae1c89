"""Hugging Face <-> Megatron: names, layouts, loading and streaming out, for any tensor x pipeline layout.

A Megatron parameter corresponds to one or more Hugging Face tensors by a rule of five kinds:

    full      the same on every tensor-parallel rank
    rows      split along the output dimension with padding at the end (vocabulary)
    columns   split along the input dimension
    gate_up   gate and up projections, each split, stacked per rank
    qkv       query, key and value interleaved by query group, then split by group
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_reheat.errors import ConfigError
from megatron_reheat.parallel.topology import Topology

Kind = Literal["full", "rows", "columns", "gate_up", "qkv"]

_OUTER: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "embedding.word_embeddings.weight": ("rows", ("model.embed_tokens.weight",)),
    "output_layer.weight": ("rows", ("lm_head.weight",)),
    "decoder.final_layernorm.weight": ("full", ("model.norm.weight",)),
}
_QKV = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
_LAYER: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "input_layernorm.weight": ("full", ("input_layernorm.weight",)),
    "pre_mlp_layernorm.weight": ("full", ("post_attention_layernorm.weight",)),
    "self_attention.q_layernorm.weight": ("full", ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": ("full", ("self_attn.k_norm.weight",)),
    "self_attention.linear_qkv.weight": ("qkv", _QKV),
    "self_attention.linear_proj.weight": ("columns", ("self_attn.o_proj.weight",)),
    "mlp.linear_fc1.weight": ("gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": ("columns", ("mlp.down_proj.weight",)),
    # Transformer Engine fuses each norm into the linear layer behind it
    "self_attention.linear_qkv.layer_norm_weight": ("full", ("input_layernorm.weight",)),
    "mlp.linear_fc1.layer_norm_weight": ("full", ("post_attention_layernorm.weight",)),
}


@dataclass(frozen=True)
class AttentionShape:
    """What the qkv rule needs: query heads, key/value groups and the head dimension of the whole model."""

    num_heads: int
    num_groups: int
    head_dim: int

    @classmethod
    def of(cls, model: GPTModel) -> AttentionShape:
        c = model.config
        return cls(c.num_attention_heads, c.num_query_groups, c.kv_channels)


@dataclass(frozen=True)
class ParameterPlan:
    """One Megatron parameter of one pipeline stage: its rule, its shard's shape and the tensors it stands for."""

    name: str
    kind: Kind
    hf_names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class HFReader:
    """Random access to the tensors of a Hugging Face folder, sharded or not, read lazily.

    Raises:
        ConfigError: the folder holds no safetensors, or a file of them is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                self._files: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"model.hf_path: {index} is damaged; copy or download the model again") from None
        elif (folder / "model.safetensors").is_file():
            self._files = dict.fromkeys(self._file("model.safetensors").keys(), "model.safetensors")
        else:
            raise ConfigError(
                f"model.hf_path: {folder} has no model.safetensors and no index of shards; save the model as safetensors"
            )
        for file in sorted(set(self._files.values())):
            self._file(file)

    def names(self) -> set[str]:
        return set(self._files)

    def get(self, name: str) -> Tensor:
        """The full tensor.

        Raises:
            ConfigError: the folder lacks it.
        """
        if name not in self._files:
            raise ConfigError(
                f"model.hf_path: {self.folder} lacks the tensor {name}, which its config.json calls for; "
                "save model and config.json together"
            )
        return self._file(self._files[name]).get_tensor(name)

    def _file(self, name: str) -> Any:
        """An open file; opening reads its header only."""
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, "pt")
            except (OSError, SafetensorError) as error:
                raise ConfigError(
                    f"model.hf_path: {self.folder / name} cannot be read ({error}); copy or download the model again"
                ) from None
        return self._open[name]


def tensor_names(hf: Any) -> list[str]:
    """What a folder with configuration `hf` must hold, those of one layer next to each other; a tied head is left out."""
    names = {n for _, hf_names in _OUTER.values() for n in hf_names}
    if hf.tie_word_embeddings:
        names.remove("lm_head.weight")
    of_layer = {n for _, hf_names in _LAYER.values() for n in hf_names}
    if hf.model_type != "qwen3":
        of_layer -= {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    names |= {f"model.layers.{i}.{n}" for i in range(hf.num_hidden_layers) for n in of_layer}
    return sorted(names)


def check_weights(hf: Any, reader: HFReader) -> None:
    """Refuses a folder that lacks tensors of the architecture in its configuration, by name.

    Raises:
        ConfigError: naming the first few.
    """
    held = reader.names()
    missing = [name for name in tensor_names(hf) if name not in held]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ConfigError(
            f"model.hf_path: {reader.folder} lacks tensors its config.json calls for: {', '.join(missing[:3])}{more}; "
            "save model and config.json together"
        )


def plan_parameters(model: GPTModel) -> list[ParameterPlan]:
    """The rules for this stage's parameters, in the model's order. A tied head on the last stage has none of its own."""
    plans = []
    for name, parameter in model.named_parameters():
        if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            continue
        kind, hf_names = _rule(model, name)
        plans.append(ParameterPlan(name, kind, hf_names, tuple(parameter.shape), parameter.dtype))
    return plans


def _rule(model: GPTModel, name: str) -> tuple[Kind, tuple[str, ...]]:
    layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if layer is None:
        return _OUTER[name]
    # layer_number counts from 1 over the whole model, whatever the pipeline split
    index = model.decoder.layers[int(layer[1])].layer_number - 1
    kind, hf_names = _LAYER[layer[2]]
    return kind, tuple(f"model.layers.{index}.{n}" for n in hf_names)


def whole_model_rules(num_layers: int) -> Iterator[tuple[str, int | None, Kind, tuple[str, ...]]]:
    """(Megatron name, layer, rule, Hugging Face names) of every parameter that some supported model has.

    Where the layer is not None, the Megatron name is the one inside a layer. Spellings of the same parameter follow each
    other: a model has one of them.
    """
    for name, (kind, hf_names) in _OUTER.items():
        yield name, None, kind, hf_names
    for layer in range(num_layers):
        for name, (kind, hf_names) in _LAYER.items():
            yield name, layer, kind, tuple(f"model.layers.{layer}.{n}" for n in hf_names)


@torch.no_grad()
def load_hf_weights(model: GPTModel, reader: HFReader, topology: Topology) -> None:
    """Fills this rank's shard of `model` (unwrapped) from a Hugging Face folder; padding rows become zero.

    Raises:
        ConfigError: a tensor is missing or has another shape than the configuration says.
    """
    attention = AttentionShape.of(model)
    parameters = dict(model.named_parameters())
    plans = plan_parameters(model)
    if model.share_embeddings_and_output_weights and "output_layer.weight" in parameters:
        # the last stage of a pipeline keeps its own copy of the tied embedding
        tied = parameters["output_layer.weight"]
        kind, hf_names = _OUTER["embedding.word_embeddings.weight"]
        plans.append(ParameterPlan("output_layer.weight", kind, hf_names, tuple(tied.shape), tied.dtype))
    for plan in plans:
        tensors = [reader.get(n) for n in plan.hf_names]
        try:
            shard = _to_shard(plan, tensors, attention, topology.tensor_rank, topology.tensor_size)
            parameters[plan.name].copy_(shard)
        except RuntimeError as error:
            shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(plan.hf_names, tensors, strict=True))
            raise ConfigError(f"{reader.folder}: {shapes} does not fit its config.json ({error})") from None


def _to_shard(
    plan: ParameterPlan, tensors: Sequence[Tensor], attention: AttentionShape, rank: int, size: int
) -> Tensor:
    """Full Hugging Face tensors -> the shard of tensor-parallel rank `rank`."""
    match plan.kind:
        case "full":
            return tensors[0]
        case "columns":
            return tensors[0].chunk(size, dim=1)[rank]
        case "gate_up":
            return torch.cat([t.chunk(size)[rank] for t in tensors])
        case "qkv":
            grouped = [t.unflatten(0, (attention.num_groups, -1)) for t in tensors]
            return torch.cat(grouped, dim=1).chunk(size)[rank].flatten(0, 1)
        case "rows":
            rows = plan.shape[0]
            own = tensors[0][rank * rows : (rank + 1) * rows]
            return torch.cat([own, own.new_zeros(rows - len(own), *own.shape[1:])])


def to_hf_tensors(
    plan: ParameterPlan, shards: Sequence[Tensor], attention: AttentionShape, vocab_size: int
) -> Iterator[tuple[str, Tensor]]:
    """All shards of a parameter -> its named Hugging Face tensors."""
    match plan.kind:
        case "full":
            tensors = [shards[0]]
        case "columns":
            tensors = [_joined(shards, dim=1)]
        case "gate_up":
            halves = [shard.chunk(2) for shard in shards]
            tensors = [_joined([h[i] for h in halves]) for i in range(2)]
        case "qkv":
            dim, per_group = attention.head_dim, attention.num_heads // attention.num_groups
            grouped = _joined(shards).unflatten(0, (attention.num_groups, -1))
            tensors = [t.flatten(0, 1) for t in grouped.split([per_group * dim, dim, dim], dim=1)]
        case "rows":
            tensors = [_joined(shards)[:vocab_size]]
    return zip(plan.hf_names, tensors, strict=True)


def _joined(shards: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Concatenated; a single shard as it is, without a copy."""
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=dim)


class HFExporter:
    """Streams a Megatron model out as Hugging Face tensors, a bucket at a time, to the leader of each replica.

    No rank ever holds more than one bucket of gathered tensors. The stream is a collective over the replica: every rank of
    it iterates to the end; only the leader (tensor rank 0 of the first stage) is given tensors, or with `to_all` every rank.
    """

    def __init__(
        self, model: GPTModel, topology: Topology, *, vocab_size: int, bucket_bytes: int, to_all: bool = False
    ) -> None:
        self._to_all = to_all
        self._parameters = dict(model.named_parameters())
        self._attention = AttentionShape.of(model)
        self._topology = topology
        self._vocab_size = vocab_size
        stages: list[list[ParameterPlan] | None] = [None] * topology.pipeline_size
        if topology.pipeline_size > 1:
            dist.all_gather_object(stages, plan_parameters(model), group=topology.pipeline_group)
        else:
            stages = [plan_parameters(model)]
        per_shard = max(bucket_bytes // topology.tensor_size, 1)
        self._buckets = [
            (stage, bucket) for stage, plans in enumerate(stages) for bucket in _buckets(plans or [], per_shard)
        ]

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        topology = self._topology
        to_others = self._to_all and topology.tensor_size * topology.pipeline_size > 1
        for stage, bucket in self._buckets:
            if topology.is_replica_leader and stage == 0 and topology.tensor_size == 1 and not to_others:
                # all of it is here: nothing to gather, and no copy to make
                for plan in bucket:
                    whole = self._parameters[plan.name].detach()
                    yield from to_hf_tensors(plan, [whole], self._attention, self._vocab_size)
                continue
            shards = self._collect(stage, bucket)
            if to_others:
                shards = self._spread(shards, bucket)
            elif not topology.is_replica_leader:
                continue
            offset = 0
            for plan in bucket:
                raw = shards[:, offset : offset + plan.num_bytes]
                offset += plan.num_bytes
                own = [r.contiguous().view(plan.dtype).view(plan.shape) for r in raw]
                yield from to_hf_tensors(plan, own, self._attention, self._vocab_size)

    def _collect(self, stage: int, bucket: Sequence[ParameterPlan]) -> Tensor:
        """[TP, bucket bytes] uint8 on the leader; whatever on the others."""
        topology = self._topology
        owns = topology.pipeline_rank == stage
        num_bytes = sum(plan.num_bytes for plan in bucket)
        shards = torch.empty(0, dtype=torch.uint8)
        if owns:
            flat = [self._parameters[p.name].detach().contiguous().view(-1).view(torch.uint8) for p in bucket]
            shards = _gather(torch.cat(flat), topology)
        if stage != 0 and topology.tensor_rank == 0:
            if owns:
                dist.send(shards, dist.get_global_rank(topology.pipeline_group, 0), group=topology.pipeline_group)
            elif topology.is_replica_leader:
                shards = torch.empty(topology.tensor_size, num_bytes, dtype=torch.uint8, device=topology.device)
                dist.recv(shards, dist.get_global_rank(topology.pipeline_group, stage), group=topology.pipeline_group)
        return shards

    def _spread(self, shards: Tensor, bucket: Sequence[ParameterPlan]) -> Tensor:
        """The leader's [TP, bucket bytes] on every rank of the replica."""
        topology = self._topology
        if not topology.is_replica_leader:
            num_bytes = sum(plan.num_bytes for plan in bucket)
            shards = torch.empty(topology.tensor_size, num_bytes, dtype=torch.uint8, device=topology.device)
        dist.broadcast(shards, dist.get_global_rank(topology.replica_group, 0), group=topology.replica_group)
        return shards


def _gather(shard: Tensor, topology: Topology) -> Tensor:
    """[n] -> [TP, n] on tensor rank 0."""
    if topology.tensor_size == 1:
        return shard[None]
    gathered = shard.new_empty(topology.tensor_size, len(shard)) if topology.tensor_rank == 0 else shard.new_empty(0)
    destination = dist.get_global_rank(topology.tensor_group, 0)
    parts = list(gathered) if topology.tensor_rank == 0 else None
    dist.gather(shard, parts, dst=destination, group=topology.tensor_group)
    return gathered


def _buckets(plans: Sequence[ParameterPlan], capacity: int) -> Iterator[list[ParameterPlan]]:
    """Consecutive parameters of at most `capacity` bytes together; a larger one travels alone."""
    bucket: list[ParameterPlan] = []
    size = 0
    for plan in plans:
        if bucket and size + plan.num_bytes > capacity:
            yield bucket
            bucket, size = [], 0
        bucket.append(plan)
        size += plan.num_bytes
    if bucket:
        yield bucket
