"""Hugging Face <-> Megatron: names, layouts, loading and streaming out, for any tensor x pipeline layout.

A Megatron parameter corresponds to one or more Hugging Face tensors by a rule of five kinds:

    full      the same on every tensor-parallel rank
    rows      split along the output dimension with padding at the end (vocabulary)
    columns   split along the input dimension
    gate_up   gate and up projections, each split, stacked per rank
    qkv       query, key and value interleaved by query group, then split by group
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_reheat.errors import ConfigError
from megatron_reheat.model.chunks import ModelChunks
from megatron_reheat.model.families import family_of, head_dim
from megatron_reheat.model.hf_reader import HFReader
from megatron_reheat.model.provider import read_hf_config
from megatron_reheat.parallel.topology import Topology

Kind = Literal["full", "rows", "columns", "gate_up", "qkv"]

# as safetensors spells what a folder's weights may be -> what they are sampled in, where they are only sampled from
WEIGHT_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# a buffer that old versions of transformers saved; it follows from the configuration
DERIVED = ".rotary_emb.inv_freq"

_OUTER: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "embedding.word_embeddings.weight": ("rows", (EMBEDDING,)),
    "output_layer.weight": ("rows", (HEAD,)),
    "decoder.final_layernorm.weight": ("full", ("model.norm.weight",)),
}
_QKV = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
_QKV_BIAS = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
_LAYER: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "input_layernorm.weight": ("full", ("input_layernorm.weight",)),
    "pre_mlp_layernorm.weight": ("full", ("post_attention_layernorm.weight",)),
    "self_attention.q_layernorm.weight": ("full", ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": ("full", ("self_attn.k_norm.weight",)),
    "self_attention.linear_qkv.weight": ("qkv", _QKV),
    "self_attention.linear_qkv.bias": ("qkv", _QKV_BIAS),
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
    def of(cls, model: ModelChunks) -> AttentionShape:
        """Not this rank's share: Megatron's configuration has the numbers of the whole model."""
        c = model.config
        return cls(c.num_attention_heads, c.num_query_groups, c.kv_channels)


@dataclass(frozen=True)
class ParameterPlan:
    """One Megatron parameter of one model chunk: its rule, its shard's shape and the tensors it stands for."""

    name: str
    kind: Kind
    hf_names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of the shard."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def tensor_shapes(hf: Any) -> dict[str, tuple[int, ...]]:
    """What a folder with configuration `hf` must hold, those of one layer next to each other; a tied head is left out."""
    hidden, dim = hf.hidden_size, head_dim(hf)
    queries, keys = hf.num_attention_heads * dim, hf.num_key_value_heads * dim
    of_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "mlp.down_proj.weight": (hidden, hf.intermediate_size),
        "mlp.gate_proj.weight": (hf.intermediate_size, hidden),
        "mlp.up_proj.weight": (hf.intermediate_size, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
    }
    if family_of(hf).qk_norm:
        of_layer |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
    if family_of(hf).qkv_bias:
        of_layer |= dict(zip(_QKV_BIAS, ((queries,), (keys,), (keys,)), strict=True))
    shapes: dict[str, tuple[int, ...]] = {} if hf.tie_word_embeddings else {HEAD: (hf.vocab_size, hidden)}
    shapes[EMBEDDING] = (hf.vocab_size, hidden)
    for layer in range(hf.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    return shapes


def read_model_folder(folder: Path) -> Any:
    """The configuration of a folder whose weights are those of the network in it. What every command asks first.

    Reads headers; of the weights themselves only a head that is said to be the embedding.

    Raises:
        ConfigError: naming the file, key or tensor at fault.
    """
    hf = read_hf_config(folder)
    check_weights(hf, HFReader(folder))
    return hf


def check_weights(hf: Any, reader: HFReader) -> None:
    """Refuses a folder that does not hold the tensors of the architecture in its configuration, each of them and no others.

    Raises:
        ConfigError: naming the first few.
    """
    shapes, held = tensor_shapes(hf), reader.names()
    together = "save model and config.json together"

    def refuse(what: str, names: Sequence[str], fix: str) -> None:
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ConfigError(f"model.hf_path: {reader.folder} {what}: {', '.join(names[:3])}{more}; {fix}")

    weights = sorted(name for name in held if not name.endswith(DERIVED))
    packed = [f"{name} ({dtype})" for name in weights if (dtype := reader.dtype(name)) not in WEIGHT_DTYPES]
    refuse("holds quantised tensors", packed, "only unquantised weights can be trained")
    expected = shapes.keys() | ({HEAD} if hf.tie_word_embeddings else set())
    refuse("holds tensors its config.json does not call for", [n for n in weights if n not in expected], together)
    refuse("lacks tensors its config.json calls for", [name for name in shapes if name not in held], together)
    for name, shape in shapes.items():
        if reader.shape(name) != shape:
            raise ConfigError(
                f"model.hf_path: {reader.folder}: {name} {reader.shape(name)} does not fit its config.json, which calls for "
                f"{shape}; {together}"
            )
    if hf.tie_word_embeddings and HEAD in held and not _equal(reader, HEAD, EMBEDDING):
        raise ConfigError(
            f"model.hf_path: {reader.folder} holds a {HEAD} of its own, but config.json says that it is the embedding; set "
            "tie_word_embeddings to false in config.json, or save the model again"
        )


def saved_dtype(reader: HFReader) -> str:
    """The name of the torch dtype that a folder's weights were saved in, that of its embedding standing for all; float64, in
    which nothing samples, counts as float32."""
    return WEIGHT_DTYPES[reader.dtype(EMBEDDING)]


def iter_folder_weights(hf: Any, reader: HFReader, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a folder that passed `check_weights`, as vLLM expects them: layer by layer, without a tied head and what
    else follows from the others.

    Raises:
        ReheatError: a tensor is not finite.
    """
    for name in tensor_shapes(hf):
        yield name, reader.get(name).to(dtype)


def _equal(reader: HFReader, a: str, b: str) -> bool:
    tensors = [reader.get(name) for name in (a, b)]
    return tensors[0].dtype == tensors[1].dtype and torch.equal(*tensors)


def plan_parameters(model: ModelChunks) -> list[list[ParameterPlan]]:
    """The rules for each chunk's parameters, in the model's order. A tied head on the last stage has none of its own."""
    is_tied = model.last.share_embeddings_and_output_weights
    return [
        [
            ParameterPlan(name, *_rule(name), tuple(parameter.shape), parameter.dtype)
            for name, parameter in chunk.items()
            if not (name == "output_layer.weight" and is_tied)
        ]
        for chunk in model.parameters_by_chunk()
    ]


def _rule(name: str) -> tuple[Kind, tuple[str, ...]]:
    layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if layer is None:
        return _OUTER[name]
    kind, hf_names = _LAYER[layer[2]]
    return kind, tuple(f"model.layers.{layer[1]}.{n}" for n in hf_names)


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
def load_hf_weights(model: ModelChunks, reader: HFReader, topology: Topology) -> None:
    """Fills this rank's shard of `model` (unwrapped) from a folder that passed `check_weights`; padding rows become zero.

    Raises:
        ReheatError: a tensor is not finite.
    """
    attention = AttentionShape.of(model)
    parameters = dict(model.named_parameters())
    plans = [plan for chunk in plan_parameters(model) for plan in chunk]
    if model.last.share_embeddings_and_output_weights and "output_layer.weight" in parameters:
        # the last stage of a pipeline keeps its own copy of the tied embedding
        tied = parameters["output_layer.weight"]
        kind, hf_names = _OUTER["embedding.word_embeddings.weight"]
        plans.append(ParameterPlan("output_layer.weight", kind, hf_names, tuple(tied.shape), tied.dtype))
    for plan in plans:
        tensors = [reader.get(n) for n in plan.hf_names]
        shard = _to_shard(plan, tensors, attention, topology.tensor_rank, topology.tensor_size)
        parameters[plan.name].copy_(shard)


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
        self, model: ModelChunks, topology: Topology, *, vocab_size: int, bucket_bytes: int, to_all: bool = False
    ) -> None:
        self._to_all = to_all
        self._parameters = dict(model.named_parameters())
        self._attention = AttentionShape.of(model)
        self._topology = topology
        self._vocab_size = vocab_size
        stages = [plan_parameters(model)] * topology.pipeline_size
        if topology.pipeline_size > 1:
            dist.all_gather_object(stages, plan_parameters(model), group=topology.pipeline_group)
        per_shard = max(bucket_bytes // topology.tensor_size, 1)
        self._buckets = [  # in the order of the layers
            (stage, bucket)
            for chunks in zip(*stages, strict=True)
            for stage, plans in enumerate(chunks)
            for bucket in _buckets(plans, per_shard)
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
