"""Analytic model of one training step: memory by component, FLOPs, bytes and collective volumes. No GPU, no weights.

It answers "does it fit" and "where does the time go", not "how fast to ten percent": every constant that is not from a
data sheet stands in `Constants`, and `reheat check` prints them next to what peers have published.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from megatron_reheat.config import Config
from megatron_reheat.errors import ConfigError
from megatron_reheat.methods import MethodChoice, choose_method
from megatron_reheat.methods.grpo import Costs
from megatron_reheat.model.architecture import (
    ENGINE_OVERHEAD_GIB,
    VALUE_BYTES,
    Architecture,
    engine_weight_bytes,
    kv_cache_bytes,
)
from megatron_reheat.model.provider import padded_vocab_size

GIB = 2**30
NODE_GPUS = 8
EULER_GAMMA = 0.5772
_SLICES = 64


@dataclass(frozen=True)
class Constants:
    """What is assumed rather than known. Fractions are of the data sheet's peak."""

    train_flops: float = 0.40
    prefill_flops: float = 0.50
    decode_bandwidth: float = 0.60
    link_bandwidth: float = 0.70
    decode_step_s: float = 3e-3
    decode_request_s: float = 20e-6
    layer_launch_s: float = 1e-4
    collective_s: float = 20e-6
    host_copy_bytes_s: float = 4e9
    generation_batches: float = 2.0
    engine_overhead_gib: float = ENGINE_OVERHEAD_GIB
    reserved_gib: float = 4.0
    storage_bytes_s: float = 1e9


CONSTANT_TEXTS = {
    "train_flops": "trainer: share of peak FLOP/s in forward and backward",
    "prefill_flops": "vLLM: share of peak FLOP/s",
    "decode_bandwidth": "vLLM: share of memory bandwidth while decoding",
    "link_bandwidth": "collectives: share of the link's bandwidth",
    "decode_step_s": "vLLM: fixed seconds per decoding step",
    "decode_request_s": "vLLM: seconds per request and step (each draws from a generator of its own)",
    "layer_launch_s": "trainer: launch seconds per layer, pass and micro-batch",
    "collective_s": "collectives: seconds of latency per hop",
    "host_copy_bytes_s": "copies of the weights to host memory, bytes/s per GPU",
    "generation_batches": "rollout batches per RL step under dynamic sampling (half of the groups kept)",
    "engine_overhead_gib": "vLLM: activations and CUDA graphs, GiB",
    "reserved_gib": "CUDA contexts, NCCL buffers and fragmentation, GiB",
    "storage_bytes_s": "checkpoints: bytes/s between a node and the storage of the run folder",
}


@dataclass(frozen=True)
class Gpu:
    """One device: data-sheet peaks, dense bf16 FLOP/s and bytes/s in one direction. `network` is per GPU, between nodes."""

    memory_gib: float
    flops: float
    memory_bytes_s: float
    nvlink_bytes_s: float
    network_bytes_s: float
    constants: Constants = Constants()


# bf16 with float32 sums; the small kinds are joined by PCIe and nodes by 10 Gbit/s
GPUS = {
    "a10g-24g": Gpu(22.1, 70e12, 0.60e12, 32e9, 1.25e9),
    "rtx3090-24g": Gpu(23.6, 71e12, 0.936e12, 32e9, 1.25e9),
    "rtx4090-24g": Gpu(23.6, 165e12, 1.008e12, 32e9, 1.25e9),
    "rtx5090-32g": Gpu(31.3, 209e12, 1.792e12, 64e9, 1.25e9),
    "a100-40g": Gpu(39.4, 312e12, 1.555e12, 300e9, 25e9),
    "l40s-48g": Gpu(44.4, 362e12, 0.864e12, 32e9, 1.25e9),
    "a100-80g": Gpu(79.1, 312e12, 2.04e12, 300e9, 25e9),
    "h100-80g": Gpu(79.1, 989e12, 3.35e12, 450e9, 50e9),
    "h200-141g": Gpu(139.8, 989e12, 4.8e12, 450e9, 50e9),
    "b200-192g": Gpu(178.0, 2250e12, 7.7e12, 900e9, 50e9),
    # one process on one core, with this core's share of a small machine
    "cpu": Gpu(
        8.0,
        1e11,
        1e10,
        2e9,
        1e9,
        Constants(
            decode_step_s=5e-3,
            decode_request_s=3e-5,
            layer_launch_s=2e-3,
            collective_s=2e-4,
            host_copy_bytes_s=1e9,
            engine_overhead_gib=0.5,
            reserved_gib=0.5,
            storage_bytes_s=2e8,
        ),
    ),
}


@dataclass(frozen=True)
class Lengths:
    """Response lengths: exponential with `scale` tokens, cut at `cap`."""

    scale: float
    cap: int

    @classmethod
    def from_mean(cls, mean: float, cap: int) -> Lengths:
        """Raises ConfigError unless 0 < mean < cap."""
        if not 0 < mean < cap:
            raise ConfigError(f"--mean-tokens {mean:g} must lie between 0 and rollout.max_tokens {cap}")
        low, high = 0.0, 1.0
        while cls(high, cap).mean < mean and high < 1e9:
            high *= 2
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if cls(middle, cap).mean < mean else (low, middle)
        return cls(high, cap)

    @property
    def mean(self) -> float:
        return self.scale * -math.expm1(-self.cap / self.scale)

    @property
    def square_mean(self) -> float:
        x = self.cap / self.scale
        if x < 1e-3:  # the closed form cancels to noise where nearly all responses reach the cap
            return self.cap**2 * (1 - 2 * x / 3)
        return 2 * self.scale**2 * (1 - math.exp(-x) * (1 + x))

    def longest(self, num_sequences: float) -> float:
        """Expected longest of `num_sequences`, in tokens."""
        return min(self.cap, self.scale * (math.log(max(num_sequences, 1.0)) + EULER_GAMMA))


@dataclass(frozen=True)
class Batch:
    """One step's sequences on one replica, and how they are cut. `minibatches` is the number of optimizer steps."""

    prompts: int
    group_size: int
    minibatches: int
    lengths: Lengths
    prompt_tokens: float
    num_replicas: int
    num_engines: int
    microbatch_tokens: int

    @property
    def sequences(self) -> int:
        return self.prompts * self.group_size

    @property
    def tokens(self) -> float:
        return self.sequences * (self.prompt_tokens + self.lengths.mean)

    @property
    def tokens_per_replica(self) -> float:
        """Of one minibatch, on the fullest replica: a sequence is never split, so the longest is a lower bound."""
        even = self.tokens / self.minibatches / self.num_replicas
        return max(even, self.prompt_tokens + self.lengths.longest(self.sequences / self.minibatches))

    @property
    def microbatches(self) -> int:
        return math.ceil(self.tokens_per_replica / self.microbatch_tokens)

    @property
    def sequences_per_engine(self) -> int:
        """On the fullest engine: prompts are dealt out whole."""
        return math.ceil(self.prompts / self.num_engines) * self.group_size

    @property
    def resident_tokens(self) -> float:
        """Mean length so far of a sequence that is met at a random decoding step."""
        return self.prompt_tokens + self.lengths.square_mean / (2 * self.lengths.mean)

    @property
    def context(self) -> float:
        """Token-weighted mean length of a sequence, which attention's work is proportional to."""
        p, x = self.prompt_tokens, self.lengths
        return (p * p + 2 * p * x.mean + x.square_mean) / (p + x.mean)


@dataclass(frozen=True)
class FrozenShape:
    """A model of `rl.samplers`: `share` of a step's sequences are its completions, in the mean over the run."""

    model: Architecture
    dtype: str
    share: float


@dataclass(frozen=True)
class Estimate:
    """A recipe on `num_gpus` devices. Bytes and seconds; `mean_tokens` is the mean response under rollout.max_tokens.

    `frozen` are the models that are sampled from besides, whose responses are taken to be as long.
    """

    config: Config
    model: Architecture
    gpu: Gpu
    num_gpus: int
    mean_tokens: float
    prompt_tokens: float
    frozen: Mapping[str, FrozenShape] = field(default_factory=dict)

    @cached_property
    def samplers(self) -> dict[str, Estimate]:
        """The same run as the engines of each frozen model see it."""
        return {
            name: replace(
                self,
                model=shape.model,
                frozen={},
                config=self.config.model_copy(
                    update={"rollout": self.config.rollout.model_copy(update={"dtype": shape.dtype})}
                ),
            )
            for name, shape in self.frozen.items()
        }

    # -- batches ---------------------------------------------------------------------------------------------------

    @cached_property
    def num_replicas(self) -> int:
        return self.config.data_parallel(self.num_gpus)

    @cached_property
    def num_engines(self) -> int:
        """Servers run on GPUs of their own, `rollout.tensor` each, that `num_gpus` does not count."""
        rollout = self.config.rollout
        if rollout.mode == "server":
            return len(rollout.servers) or rollout.num_servers
        return self.num_gpus // rollout.tensor if rollout.mode == "colocated" else self.num_replicas

    @cached_property
    def rl_batch(self) -> Batch:
        rl = self.config.rl
        lengths = Lengths.from_mean(self.mean_tokens, self.config.rollout.max_tokens)
        updates = rl.prompts_per_step // (rl.minibatch_prompts or rl.prompts_per_step)
        return self._batch(rl.prompts_per_step, rl.group_size, updates, lengths)

    @cached_property
    def _method(self) -> MethodChoice:
        return choose_method(self.config)

    @cached_property
    def costs(self) -> Costs:
        """What a step of `rl.method` takes beyond GRPO's."""
        return self._method.costs(self.config)

    @property
    def hinted_batch(self) -> Batch:
        """The RL batch as a teacher reads it: behind prompts that show a solution about as long as a response, if any."""
        if self._method.cls.hint(self._method.options) is None:
            return self.rl_batch
        hinted = min(self.config.data.max_hinted_prompt_tokens, self.prompt_tokens + self.rl_batch.lengths.mean)
        return replace(self.rl_batch, prompt_tokens=hinted)

    @cached_property
    def reheat_batch(self) -> Batch:
        """The same responses, cut at reheat.max_tokens."""
        reheat = self.config.reheat
        lengths = Lengths(self.rl_batch.lengths.scale, self.config.reheat_tokens)
        return self._batch(reheat.prompts_per_step, reheat.group_size, 1, lengths)

    def _batch(self, prompts: int, group_size: int, updates: int, lengths: Lengths) -> Batch:
        microbatch_tokens = self.config.parallel.microbatch_tokens
        replicas, engines = self.num_replicas, self.num_engines
        return Batch(prompts, group_size, updates, lengths, self.prompt_tokens, replicas, engines, microbatch_tokens)

    # -- memory ----------------------------------------------------------------------------------------------------

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
        return choose_method(self.config).needs_reference(self.config)

    def reference_bytes(self, stage: int = 0) -> float:
        """In host memory for each GPU of a pipeline stage, all through the run: this rank's weights of the reference."""
        return float(self.stage_parameters(stage) * VALUE_BYTES[self.config.model.dtype]) if self.has_reference else 0.0

    def stage_parameters(self, stage: int) -> int:
        """Of one tensor-parallel rank of pipeline stage `stage`, vocabulary padding included."""
        m, p = self.model, self.config.parallel
        layers = m.num_hidden_layers // p.pipeline * (m.matrix_parameters // p.tensor + m.vector_parameters)
        table = padded_vocab_size(m.vocab_size, self.config) // p.tensor * m.hidden_size
        first, last = stage == 0, stage == p.pipeline - 1
        own_head = last and not (m.tie_word_embeddings and first)  # a tied head on another stage is a copy
        return layers + first * table + own_head * table + last * m.hidden_size

    def activation_bytes(self, stage: int = 0) -> float:
        """Kept for the backward pass by the micro-batches in flight, with fused kernels (Transformer Engine).

        Full recompute keeps each layer's input and one layer's inside. Selective recompute repeats the attention core,
        which keeps nothing of size under flash attention, so it costs and saves next to nothing here.
        """
        m, p = self.model, self.config.parallel
        split = p.tensor if p.sequence_parallel else 1
        # norm inputs and outputs; qkv, rotated q and k, attention output; gate and up, their product
        inside = 4 * m.hidden_size / split
        inside += (3 * m.query_width + 3 * m.kv_width + 3 * m.intermediate_size) / p.tensor
        token = VALUE_BYTES[self.config.model.dtype] * p.microbatch_tokens
        layers = m.num_hidden_layers // p.pipeline
        in_flight = p.pipeline - stage
        if self.config.model.recompute == "full":
            return token * (in_flight * layers * m.hidden_size / split + inside)
        return token * in_flight * layers * inside

    def head_bytes(self) -> float:
        """Three float32 tensors [chunk, V/TP] for each vocabulary with a gradient, one for a teacher's; without the fused head
        the logits [micro-batch, V/TP] as well."""
        c, tensors = self.config, 3 * (1 + self.costs.heads) + (self.costs.read > 0)
        columns = padded_vocab_size(self.model.vocab_size, c) // c.parallel.tensor
        chunk = tensors * 4 * min(c.model.head_chunk_tokens, c.parallel.microbatch_tokens) * columns
        return chunk + (
            0 if c.model.fused_head else c.parallel.microbatch_tokens * columns * VALUE_BYTES[c.model.dtype]
        )

    @property
    def _engine_value_bytes(self) -> int:
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
        return held / self.model.kv_bytes_per_token(self._engine_value_bytes)

    # -- time ------------------------------------------------------------------------------------------------------

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
            "update": batch.minibatches * update,
            "sync": self.sync_seconds() + self.turn_seconds(batches),
        }

    @property
    def scores_in_update(self) -> bool:
        """Whether the step's only update scores the batch as well."""
        return self._method.cls.scores_in_loss and self.rl_batch.minibatches == 1 and not self.costs.trained

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
        """No score phase: the teacher is the student's own logits. The update keeps a copy of the weights on the host."""
        batch = self.reheat_batch
        snapshot = self.snapshot_bytes() / self.gpu.constants.host_copy_bytes_s
        update = self.pass_seconds(batch, training=True) + self.optimizer_seconds() + snapshot
        return {"rollout": self.rollout_seconds(batch), "score": 0.0, "update": update, "sync": self.sync_seconds()}

    def rollout_seconds(self, batch: Batch) -> float:
        """Full batches while requests wait, then a tail in which they finish one by one; decoding reads all weights each
        step, so a thin tail costs as many steps as a thick one."""
        p, x, slots = batch.prompt_tokens, batch.lengths, self.concurrent_sequences(batch)
        waiting = batch.sequences_per_engine - slots
        full = waiting * x.mean / slots * self._decode_step(slots, batch.resident_tokens)
        longest = x.longest(slots)
        width = longest / _SLICES
        tail = 0.0
        for i in range(_SLICES):
            reached = (i + 0.5) * width
            alive = max(1.0, slots * math.exp(-reached / x.scale))
            tail += width * self._decode_step(alive, p + reached)
        prompts = math.ceil(batch.prompts / batch.num_engines)  # a group shares its prompt through the prefix cache
        flops = 2 * self.model.num_parameters * prompts * p / self.config.rollout.tensor
        return full + tail + flops / (self.gpu.flops * self.gpu.constants.prefill_flops)

    def concurrent_sequences(self, batch: Batch) -> float:
        """That an engine decodes at a time, as its KV cache and rollout.max_num_seqs allow."""
        by_cache = self.kv_cache_tokens / batch.resident_tokens
        return max(1.0, min(batch.sequences_per_engine, self.config.rollout.max_num_seqs, by_cache))

    def _decode_step(self, requests: float, context: float) -> float:
        m, constants = self.model, self.gpu.constants
        value = self._engine_value_bytes
        read = (m.num_hidden_layers * m.matrix_parameters + m.head_parameters) * value
        cache = requests * context * m.kv_bytes_per_token(value)
        flops = requests * (self._forward_flops(context * 2, head=1.0))
        bound = max(
            (read + cache) / (self.gpu.memory_bytes_s * constants.decode_bandwidth),
            flops / (self.gpu.flops * constants.prefill_flops),
        )
        bound /= self.config.rollout.tensor
        return bound + constants.decode_step_s + requests * constants.decode_request_s

    def _forward_flops(self, context: float, *, head: float) -> float:
        """Per token of sequences of `context` tokens (causal: half of it is seen); `head` is the share of head positions."""
        m = self.model
        layers = m.num_hidden_layers * (2 * m.matrix_parameters + 2 * context * m.query_width)
        return layers + head * 2 * m.head_parameters

    def pass_flops(self, context: float, *, head: float, training: bool) -> float:
        """Per token: forward, and twice that backward; recompute repeats forward."""
        body = self._forward_flops(context, head=0.0)
        lm_head = head * 2 * self.model.head_parameters
        if not training:
            return body + lm_head
        body *= 4 if self.config.model.recompute == "full" else 3
        return body + lm_head * 3  # the fused head's gradient is taken while its logits exist

    def pass_seconds(self, batch: Batch, *, training: bool) -> float:
        """Forward (or forward and backward) of one minibatch, tensor-parallel collectives and pipeline bubble included."""
        m, p, constants = self.model, self.config.parallel, self.gpu.constants
        head = batch.lengths.mean / (batch.prompt_tokens + batch.lengths.mean) if self.config.model.fused_head else 1.0
        tokens, count = batch.tokens_per_replica, batch.microbatches
        flops = tokens * self.pass_flops(batch.context, head=head, training=training) / (p.tensor * p.pipeline)
        layers = m.num_hidden_layers / p.pipeline
        passes = 1 if not training else 4 if self.config.model.recompute == "full" else 3
        seconds = flops / (self.gpu.flops * constants.train_flops) + passes * count * layers * constants.layer_launch_s
        if p.tensor > 1:
            # two all-reduces (or their halves) per layer in each of forward, backward and recompute
            reductions = 2 * layers * max(1, passes - 1)
            volume = 2 * (p.tensor - 1) / p.tensor * m.hidden_size * VALUE_BYTES[self.config.model.dtype] * tokens
            seconds += reductions * (
                volume / self._link(p.tensor) + count * 2 * (p.tensor - 1) * constants.collective_s
            )
        return seconds * (count + p.pipeline - 1) / count

    def head_seconds(self, batch: Batch) -> float:
        """The LM head forward and backward over one minibatch's responses, on the last pipeline stage."""
        p, share = self.config.parallel, batch.lengths.mean / (batch.prompt_tokens + batch.lengths.mean)
        flops = batch.tokens_per_replica * share * 3 * 2 * self.model.head_parameters / p.tensor
        return flops / (self.gpu.flops * self.gpu.constants.train_flops)

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
        """A checkpoint, weights and optimizer: written by all nodes at once, read again by the first for the digests."""
        size = self.model.num_parameters * (VALUE_BYTES[self.config.model.dtype] + self.optimizer_bytes)
        nodes = math.ceil(self.num_gpus / NODE_GPUS)
        return size * (1 + 1 / nodes) / self.gpu.constants.storage_bytes_s

    def sync_seconds(self) -> float:
        """Gather on the replica's first rank (and back to the others, colocated), then into the engines."""
        p, mode = self.config.parallel, self.config.rollout.mode
        ranks = p.tensor * p.pipeline
        weights = self.model.num_parameters * self._engine_value_bytes
        gather = weights * (ranks - 1) / ranks / self._link(ranks)
        if mode == "colocated" and ranks > 1:
            gather += weights / self._link(ranks)
        if mode == "server":
            return gather + weights / (self.gpu.network_bytes_s * self.gpu.constants.link_bandwidth)
        # packed into the shared buffer and unpacked by vLLM: two reads and two writes
        return gather + 4 * weights / self.gpu.memory_bytes_s

    def _link(self, ranks: int) -> float:
        """Bytes/s of a collective over `ranks` neighbouring GPUs."""
        bandwidth = self.gpu.nvlink_bytes_s if ranks <= NODE_GPUS else self.gpu.network_bytes_s
        return bandwidth * self.gpu.constants.link_bandwidth
