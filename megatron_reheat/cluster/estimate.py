"""Analytic model of one training step: memory by component, FLOPs, bytes and collective volumes. No GPU, no weights.

It answers "does it fit" and "where does the time go", not "how fast to ten percent": every constant that is not from a
data sheet stands in `Constants`, and `reheat check` prints them next to what peers have published.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_reheat.cluster.gpus import NODE_GPUS
from megatron_reheat.cluster.memory import Memory
from megatron_reheat.cluster.workload import Batch
from megatron_reheat.model.architecture import VALUE_BYTES

_SLICES = 64
# Flash attention's backward takes five products where forward takes two: it makes the scores anew.
_ATTENTION_BACKWARD = 2.5
# Of a float32 logit, bytes: written, read twice and rewritten as its gradient, which is read and written as bf16; scored, the
# first half.
_LOSS_BYTES, _SCORE_BYTES = 22, 8


@dataclass(frozen=True)
class Estimate(Memory):
    """Memory in bytes (`Memory`), and time in seconds."""

    def rl_step(self) -> dict[str, float]:
        """Seconds by phase; grading is not modeled. What the method adds goes by its `costs`. A reference policy costs one more
        scoring pass, before and after which its weights and the policy's change places."""
        batch, hinted, costs = self.rl_batch, self.hinted_batch, self.costs
        batches = self.gpu.constants.generation_batches if self.config.rl.dynamic_sampling else 1.0
        own = max(
            1, round(batch.group_size * (1 + min(costs.sampled, 0.0)))
        )  # frozen models may take some of the group over
        asked = batch
        if self.config.rl.oversample:  # as many in one generation batch, and the margin of `Collector`
            margin = math.sqrt(batch.prompts * (1 - 1 / batches))
            asked, batches = replace(batch, prompts=math.ceil(batches * (batch.prompts + margin))), 1.0
        rollout = batches * (self.rollout_seconds(replace(asked, group_size=own)) + self.frozen_seconds(asked))
        if costs.sampled > 0:
            rollout += self.rollout_seconds(replace(batch, prompts=math.ceil(batch.prompts * costs.sampled)))
        score = 0.0 if self.scores_in_update else (1 + costs.trained) * self.pass_seconds(batch, training=False)
        score += costs.scored * self.pass_seconds(hinted, training=False)
        update = (1 + costs.trained) * self.pass_seconds(batch, training=True) + costs.heads * self.head_seconds(batch)
        update += costs.read * self.pass_seconds(hinted, training=False) + self.optimizer_seconds()
        score *= batch.minibatches
        if self.has_reference:
            score += batch.minibatches * self.pass_seconds(batch, training=False)
            score += 4 * self.reference_bytes() / self.gpu.constants.host_copy_bytes_s
        return {
            "rollout": rollout,
            "score": score,
            "update": batch.minibatches * update + self.gpu.constants.step_s,
            "sync": self.sync_seconds() + self.turn_seconds(batches),
        }

    @property
    def scores_in_update(self) -> bool:
        """Whether the step's only update scores the batch as well."""
        return self.method.cls.scores_in_loss and self.rl_batch.minibatches == 1 and not self.costs.trained

    def frozen_seconds(self, batch: Batch) -> float:
        """What frozen models sample for a generation batch, one after the other."""
        sizes = {name: max(1, round(batch.group_size * shape.share)) for name, shape in self.frozen.items()}
        return sum(e.rollout_seconds(replace(batch, group_size=sizes[name])) for name, e in self.samplers.items())

    def turn_seconds(self, batches: float) -> float:
        """Colocated, a frozen model's weights come from the host and go back for each generation batch, and the policy's are
        sent again for every one after the first."""
        if self.config.rollout.mode != "colocated" or not self.frozen:
            return 0.0
        copied = 2 * sum(e.engine_weight_bytes for e in self.samplers.values()) / self.gpu.constants.host_copy_bytes_s
        return batches * copied + (batches - 1) * self.sync_seconds()

    def reheat_step(self) -> dict[str, float]:
        """No score phase: the teacher is the student's own logits, or a frozen one reads the batch first, whose weights and the
        policy's change places. The update keeps a copy of the weights on the host."""
        batch = self.reheat_batch
        copied = self.snapshot_bytes()
        update = self.pass_seconds(batch, training=True) + self.optimizer_seconds() + self.gpu.constants.step_s
        if self.has_frozen_teacher:
            update += self.pass_seconds(batch, training=False)
            copied += 4 * self.stage_parameters(0) * VALUE_BYTES[self.config.model.dtype]
        update += copied / self.gpu.constants.host_copy_bytes_s
        return {"rollout": self.rollout_seconds(batch), "score": 0.0, "update": update, "sync": self.sync_seconds()}

    def rollout_seconds(self, batch: Batch) -> float:
        """Full batches while requests wait, then a tail in which they finish one by one; decoding reads all weights each
        step, so a thin tail costs as many steps as a thick one."""
        p, x, slots = batch.prompt_tokens, batch.lengths, self.concurrent_sequences(batch)
        waiting = batch.sequences_per_engine - slots
        full = waiting * x.mean / slots * self.decode_step_s(slots, batch.resident_tokens)
        longest = x.longest(slots)
        width = longest / _SLICES
        tail = 0.0
        for i in range(_SLICES):
            reached = (i + 0.5) * width
            alive = max(1.0, slots * math.exp(-reached / x.scale))
            tail += width * self.decode_step_s(alive, p + reached)
        prompts = math.ceil(batch.prompts / batch.num_engines)  # a group shares its prompt through the prefix cache
        return full + tail + self.prefill_seconds(prompts * p)

    def prefill_seconds(self, tokens: float) -> float:
        """Of an engine, for so many tokens of prompts too short for attention to count."""
        flops = 2 * self.model.num_parameters * tokens / self.config.rollout.tensor
        return flops / (self.gpu.flops * self.gpu.constants.prefill_flops)

    def concurrent_sequences(self, batch: Batch) -> float:
        """That an engine decodes at a time, as its KV cache and rollout.max_num_seqs allow."""
        by_cache = self.kv_cache_tokens / batch.resident_tokens
        return max(1.0, min(batch.sequences_per_engine, self.config.rollout.max_num_seqs, by_cache))

    def decode_step_s(self, requests: float, context: float) -> float:
        """One token of each of so many sequences of `context` tokens."""
        m, constants = self.model, self.gpu.constants
        value = self.engine_value_bytes
        read = (m.num_hidden_layers * m.matrix_parameters + m.head_parameters) * value
        cache = requests * context * m.kv_bytes_per_token(value)
        flops = requests * self._decode_flops(context)
        bound = max(
            (read + cache) / (self.gpu.memory_bytes_s * constants.decode_bandwidth),
            flops / (self.gpu.flops * constants.prefill_flops),
        )
        fixed = constants.decode_step_s + requests * constants.decode_seed_s
        return bound / self.config.rollout.tensor + self._decode_sums_s(requests) + fixed

    def _decode_sums_s(self, requests: float) -> float:
        """Two all-reduces a layer over an engine's GPUs, each of which reads the others' parts at once."""
        m, tensor = self.model, self.config.rollout.tensor
        if tensor == 1:
            return 0.0
        volume = 2 * (tensor - 1) / tensor * requests * m.hidden_size * self.engine_value_bytes
        return 2 * m.num_hidden_layers * (self.gpu.constants.collective_s + volume / self._link(tensor))

    def _decode_flops(self, context: float) -> float:
        """Of a token that `context` others come before."""
        m = self.model
        layers = m.num_hidden_layers * (2 * m.matrix_parameters + 4 * context * m.query_width)
        return layers + 2 * m.head_parameters

    def token_flops(self, context: float, *, head: float, training: bool) -> tuple[float, float]:
        """In matrix products and in attention, for each token of causal sequences of `context` tokens: forward, and if
        `training` backward with what `model.recompute` repeats. `head` is the share of tokens with logits, whose gradient
        the fused head takes while they exist."""
        m, recompute = self.model, self.config.model.recompute
        passes, cores, heads = 1.0, 1.0, 1.0
        repeated = 0.0
        if training:
            passes = 3.0 + (recompute == "full")
            cores = 1.0 + _ATTENTION_BACKWARD + (recompute == "full")
            heads = 3.0
            repeated = 3.0 * m.hidden_size * m.intermediate_size if recompute == "selective" else 0.0
        layers = m.num_hidden_layers * 2 * (passes * m.matrix_parameters + repeated)
        return layers + heads * head * 2 * m.head_parameters, cores * m.num_hidden_layers * 2 * context * m.query_width

    def _passes(self, training: bool) -> float:
        """Of a layer, as its kernels and collectives count: an MLP is about half of both."""
        return 3 + {"none": 0.0, "selective": 0.5, "full": 1.0}[self.config.model.recompute] if training else 1.0

    def token_seconds(self, context: float, *, head: float, training: bool) -> float:
        """Of one device for a token's whole model; see `token_flops`. What is bound by memory is added: it overlaps with
        nothing on one stream."""
        m, constants = self.model, self.gpu.constants
        matrices, attention = self.token_flops(context, head=head, training=training)
        # two norms, two residual sums, norms and rotation of queries and keys, the gated activation: each read and written
        values = 10 * m.hidden_size + 4 * (m.query_width + m.kv_width) + 3 * m.intermediate_size
        moved: float = self._passes(training) * m.num_hidden_layers * values * VALUE_BYTES[self.config.model.dtype]
        moved += head * m.vocab_size * (_LOSS_BYTES if training else _SCORE_BYTES)
        return (
            matrices / (self.gpu.flops * constants.matmul_flops)
            + attention / (self.gpu.flops * constants.attention_flops)
            + moved / (self.gpu.memory_bytes_s * constants.elementwise_bandwidth)
        )

    def pass_seconds(self, batch: Batch, *, training: bool) -> float:
        """Forward (or forward and backward) of one minibatch, with tensor-parallel collectives, the exchange of keys and values
        between context ranks, and the pipeline's bubble.

        The host launches kernels ahead of the device, so a micro-batch takes what the slower of the two takes.
        """
        m, p, constants = self.model, self.config.parallel, self.gpu.constants
        head = batch.lengths.mean / (batch.prompt_tokens + batch.lengths.mean) if self.config.model.fused_head else 1.0
        tokens, count = batch.tokens_per_block / p.context, batch.microbatches
        seconds = tokens * self.token_seconds(batch.context, head=head, training=training) / (p.tensor * p.pipeline)
        layers = m.num_hidden_layers / p.pipeline
        passes = self._passes(training)
        if p.tensor > 1:
            # two all-reduces (or their halves) per layer in each of forward, backward and recompute
            reductions = 2 * layers * max(1, passes - 1)
            volume = 2 * (p.tensor - 1) / p.tensor * m.hidden_size * VALUE_BYTES[self.config.model.dtype] * tokens
            seconds += reductions * (
                volume / self._link(p.tensor) + count * 2 * (p.tensor - 1) * constants.collective_s
            )
        if p.context > 1:
            # keys and values of the others pass through each rank, backward with their gradients
            passing = 2 * m.kv_width / p.tensor * VALUE_BYTES[self.config.model.dtype] * tokens * (p.context - 1)
            latency = count * (p.context - 1) * constants.collective_s
            seconds += layers * passes * (passing / self._link(p.tensor * p.context) + latency)
        launching = passes * count * layers * constants.layer_launch_s
        seconds += launching - constants.launch_overlap * min(seconds, launching)
        return seconds * (count + (p.pipeline - 1) / p.virtual_pipeline) / count

    def head_seconds(self, batch: Batch) -> float:
        """The LM head forward and backward over one minibatch's responses, on the last pipeline stage."""
        p, share = self.config.parallel, batch.lengths.mean / (batch.prompt_tokens + batch.lengths.mean)
        flops = batch.tokens_per_block * share * 3 * 2 * self.model.head_parameters / (p.tensor * p.context)
        return flops / (self.gpu.flops * self.gpu.constants.matmul_flops)

    def optimizer_seconds(self) -> float:
        """Gradient reduction, AdamW on this rank's shard, and the new weights back."""
        constants, replicas, value = self.gpu.constants, self.num_replicas, VALUE_BYTES[self.config.model.dtype]
        parameters = self.stage_parameters(0)
        sharded = self.config.parallel.distributed_optimizer
        # zeroed, accumulated, checked for NaN, measured: four passes over the gradients
        touched = 16 * parameters + 28 * parameters / (replicas if sharded else 1)
        volume = parameters * ((4 + value) if sharded else 8) * (replicas - 1) / replicas
        latency = 2 * (replicas - 1) * constants.collective_s
        return touched / self.gpu.memory_bytes_s + volume / self._link(self.num_gpus) + latency

    def save_seconds(self) -> float:
        """A checkpoint, weights and optimizer, that is waited for: the first replica's nodes write it and read it again for the
        digests."""
        size = self.model.num_parameters * (VALUE_BYTES[self.config.model.dtype] + self.optimizer_bytes)
        nodes = math.ceil(self.config.parallel.tensor * self.config.parallel.pipeline / NODE_GPUS)
        return 2 * size / nodes / self.gpu.constants.storage_bytes_s

    def sync_seconds(self) -> float:
        """Of one weight sync; see `sync_parts`."""
        return sum(self.sync_parts().values())

    def sync_parts(self) -> dict[str, float]:
        """Seconds of a weight sync by what they go to, one after the other.

        Gathered on the replica's first rank (and, colocated, back on the others), tensor by tensor given to vLLM, and copied:
        to servers over the network, elsewhere into a buffer on the trainer's GPU, which an engine's other GPUs read over
        their links.
        """
        p, rollout, gpu = self.config.parallel, self.config.rollout, self.gpu
        ranks = p.tensor * p.pipeline
        weights = self.model.num_parameters * self.engine_value_bytes
        parts = {}
        if ranks > 1:
            there_and_back = (ranks - 1) / ranks + (rollout.mode == "colocated")
            parts[f"gathered from {ranks} ranks"] = weights * there_and_back / self._link(ranks)
        parts[f"{self.model.num_tensors} tensors loaded"] = self.model.num_tensors * gpu.constants.sync_tensor_s
        if rollout.mode == "server":
            parts["over the network"] = weights / (gpu.network_bytes_s * gpu.constants.link_bandwidth)
            return parts
        # packed into the shared buffer and unpacked by vLLM: two reads and two writes
        parts["copied on the device"] = 4 * weights / gpu.memory_bytes_s
        if rollout.tensor > 1:  # whole tensors, of which each keeps its part
            parts[f"read by {rollout.tensor - 1} more"] = (rollout.tensor - 1) * weights / self._link(rollout.tensor)
        return parts

    def _link(self, ranks: int) -> float:
        """Bytes/s of a collective over `ranks` neighbouring GPUs."""
        bandwidth = self.gpu.nvlink_bytes_s if ranks <= NODE_GPUS else self.gpu.network_bytes_s
        return bandwidth * self.gpu.constants.link_bandwidth
