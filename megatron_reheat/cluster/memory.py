"""Memory by component: trainer and engines on a GPU, copies on its host."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from megatron_reheat.cluster.gpus import GIB
from megatron_reheat.cluster.workload import Workload
from megatron_reheat.model.architecture import VALUE_BYTES, engine_weight_bytes, kv_cache_bytes
from megatron_reheat.model.provider import padded_vocab_size


@dataclass(frozen=True)
class Memory(Workload):
    """Bytes."""

    def memory(self) -> dict[str, float]:
        """Bytes by component on the fullest GPU: the leader of a replica, on its first or last pipeline stage.

        Colocated engines take turns with the trainer and with each other, so only the largest is there.
        """
        last = self.config.parallel.pipeline - 1
        return max((self._stage_memory(stage) for stage in {0, last}), key=lambda parts: sum(parts.values()))

    def _stage_memory(self, stage: int) -> dict[str, float]:
        c, value = self.config, VALUE_BYTES[self.config.model.dtype]
        parameters = self.stage_parameters(stage)
        shards = self.num_replicas if c.parallel.distributed_optimizer else 1
        optimizer = parameters * self.optimizer_bytes / shards
        parts = {
            f"weights ({c.model.dtype})": float(parameters * value),
            "main gradients (float32)": float(parameters * 4),
            "optimizer" + (" shard" if c.parallel.distributed_optimizer else ""): optimizer,
        }
        training = {f"activations (recompute: {c.model.recompute})": self.activation_bytes(stage)}
        if stage == c.parallel.pipeline - 1:
            training["fused LM head" if c.model.fused_head else "logits"] = self.head_bytes()
            if read := self.read_bytes():
                training["a teacher's hidden states"] = read
        sampling = [
            {f"{name}: weights": e.engine_weight_bytes, f"{name}: KV cache": e.kv_cache_bytes}
            for name, e in {"vLLM": self, **self.samplers}.items()
        ]
        overhead = {"vLLM: overhead": len(sampling) * self.gpu.constants.engine_overhead_gib * GIB}
        if c.rollout.mode == "colocated":
            parts |= max(training, *sampling, key=lambda phase: sum(phase.values())) | overhead
        elif c.rollout.mode == "embedded" and stage == 0:
            parts |= training | {name: size for one in sampling for name, size in one.items()} | overhead
        else:
            parts |= training
        parts["reserved"] = self.gpu.constants.reserved_gib * GIB
        return parts

    @property
    def optimizer_bytes(self) -> int:
        """A parameter. With bf16 weights: float32 master weights and two moments; float32 weights are their own master."""
        return 12 if VALUE_BYTES[self.config.model.dtype] == 2 else 8

    def snapshot_bytes(self, stage: int = 0) -> float:
        """In host memory for each GPU of a pipeline stage, while reheating: the float32 weights that a rollback puts back, of
        which the distributed optimizer gives each replica its part. Float32 weights are copied whole."""
        config = self.config
        sharded = config.parallel.distributed_optimizer and VALUE_BYTES[config.model.dtype] == 2
        return 4 * self.stage_parameters(stage) / (self.num_replicas if sharded else 1)

    @cached_property
    def has_reference(self) -> bool:
        """Whether a frozen reference policy is scored besides (`rl.kl_coef`, or the method's own)."""
        return self.method.needs_reference(self.config)

    def reference_bytes(self, stage: int = 0) -> float:
        """In host memory for each GPU of a pipeline stage, all through the run: this rank's weights of the reference."""
        return float(self.stage_parameters(stage) * VALUE_BYTES[self.config.model.dtype]) if self.has_reference else 0.0

    @property
    def has_frozen_teacher(self) -> bool:
        """Whether reheating is towards the policy with which a round began."""
        return self.config.controller.trains and self.config.reheat.teacher == "frozen"

    def teacher_bytes(self, stage: int = 0) -> float:
        """In host memory for each GPU of a pipeline stage, while reheating: a frozen teacher's float32 weights, as for a
        rollback, and this rank's to read with."""
        own = self.stage_parameters(stage) * VALUE_BYTES[self.config.model.dtype]
        return self.snapshot_bytes(stage) + own if self.has_frozen_teacher else 0.0

    def save_bytes(self, num_gpus: int) -> float:
        """In host memory of the first node, which has `num_gpus` GPUs of the run, while a checkpoint is written: a rank's part
        of what replicas share, and on the first replica's all of that, and the rest (`HostCopy`)."""
        config, parallel = self.config, self.config.parallel
        weights = VALUE_BYTES[config.model.dtype]
        snapshots = (1 + self.has_frozen_teacher) * config.controller.trains
        shared, whole = 0, weights + 4 * snapshots  # bytes a parameter
        if parallel.distributed_optimizer:
            # master weights, of float32 weights a copy, and two moments; snapshots are shared as master weights are
            shared = 12 + 4 * snapshots * (weights == 2)
            whole = weights + 4 * snapshots * (weights == 4) + shared * (self.num_replicas > 1)
        else:
            whole += self.optimizer_bytes
        # ranks of one stage are next to each other, those of its first replica first
        stages = math.ceil(num_gpus * parallel.pipeline / self.num_gpus)
        first = min(num_gpus, stages * parallel.tensor)
        parameters = max(map(self.stage_parameters, (0, parallel.pipeline - 1)))
        return parameters * (first * whole + num_gpus * shared / self.num_replicas)

    def read_bytes(self) -> float:
        """On the last stage: final hidden states of what is read beside the policy's own, kept through the update; and a frozen
        teacher's head."""
        batches = [self.rl_batch] * (self.costs.read > 0) + [self.reheat_batch] * self.has_frozen_teacher
        responses = [b.tokens_per_block * b.lengths.mean / (b.prompt_tokens + b.lengths.mean) for b in batches]
        head = padded_vocab_size(self.model.vocab_size, self.config) // self.config.parallel.tensor
        rows = max(responses, default=0.0) / self.config.parallel.context + self.has_frozen_teacher * head
        return rows * self.model.hidden_size * VALUE_BYTES[self.config.model.dtype]

    def stage_parameters(self, stage: int) -> int:
        """Of one tensor-parallel rank of pipeline stage `stage`, vocabulary padding included."""
        m, p = self.model, self.config.parallel
        layers = m.num_hidden_layers // p.pipeline * (m.matrix_parameters // p.tensor + m.vector_parameters)
        table = padded_vocab_size(m.vocab_size, self.config) // p.tensor * m.hidden_size
        first, last = stage == 0, stage == p.pipeline - 1
        own_head = last and not (m.tie_word_embeddings and first)  # a tied head on another stage is a copy
        return layers + first * table + own_head * table + last * m.hidden_size

    def activation_bytes(self, stage: int = 0) -> float:
        """Kept for the backward pass by a rank's parts of the micro-batches in flight, with fused kernels (Transformer Engine).

        Full recompute keeps each layer's input and one layer's inside; selective recompute each layer's attention and one
        layer's MLP.
        """
        m, p = self.model, self.config.parallel
        split = p.tensor if p.sequence_parallel else 1
        # both parts' inputs and a norm's output; qkv, rotated q and k, attention output
        attention = 3 * m.hidden_size / split + (3 * m.query_width + 3 * m.kv_width) / p.tensor
        # a norm's output; gate and up, their product
        mlp = m.hidden_size / split + 3 * m.intermediate_size / p.tensor
        token = VALUE_BYTES[self.config.model.dtype] * p.microbatch_tokens / p.context
        layers = self.chunks_in_flight(stage) * (m.num_hidden_layers // (p.pipeline * p.virtual_pipeline))
        if self.config.model.recompute == "full":
            return token * (layers * m.hidden_size / split + attention + mlp)
        if self.config.model.recompute == "selective":
            return token * (layers * attention + mlp)
        return token * layers * (attention + mlp)

    def chunks_in_flight(self, stage: int) -> int:
        """Passes of micro-batches through model chunks of a stage, forward and not yet back, at most; one chunk is all of its
        layers without virtual stages. Both schedules are those of arXiv 2104.04473."""
        p = self.config.parallel
        if p.virtual_pipeline == 1:
            return p.pipeline - stage
        return 2 * (p.pipeline - stage - 1) + (p.virtual_pipeline - 1) * p.pipeline + 1

    def head_bytes(self) -> float:
        """Three float32 tensors [chunk, V/TP] for each vocabulary with a gradient, one for a teacher's; without the fused head
        the logits [micro-batch, V/TP] as well."""
        c, tensors = self.config, 3 * (1 + self.costs.heads) + (self.costs.read > 0 or self.has_frozen_teacher)
        tokens = c.parallel.microbatch_tokens / c.parallel.context
        columns = padded_vocab_size(self.model.vocab_size, c) // c.parallel.tensor
        chunk = tensors * 4 * min(c.model.head_chunk_tokens, tokens) * columns
        return chunk + (0 if c.model.fused_head else tokens * columns * VALUE_BYTES[c.model.dtype])

    @property
    def engine_value_bytes(self) -> int:
        """Of one of an engine's weights."""
        dtype: str = self.config.rollout.dtype
        return VALUE_BYTES[self.config.model.dtype if dtype == "auto" else dtype]

    @property
    def engine_weight_bytes(self) -> float:
        """On each of the engine's GPUs."""
        return engine_weight_bytes(self.model, self.config.rollout, self.config.model.dtype)

    @property
    def kv_cache_bytes(self) -> float:
        """On each GPU of an engine; may be negative."""
        c, gpu = self.config, self.gpu
        return kv_cache_bytes(self.model, c.rollout, c.model.dtype, gpu.memory_gib, gpu.constants.engine_overhead_gib)

    @property
    def kv_cache_tokens(self) -> float:
        """Of one engine."""
        held = self.kv_cache_bytes * self.config.rollout.tensor
        return held / self.model.kv_bytes_per_token(self.engine_value_bytes)
