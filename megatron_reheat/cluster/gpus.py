"""Kinds of GPUs by their data sheets, and what is assumed of them rather than known."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_reheat.model.architecture import ENGINE_OVERHEAD_GIB

GIB = 2**30
NODE_GPUS = 8


@dataclass(frozen=True)
class Constants:
    """What is assumed rather than known. Fractions are of the data sheet's peak.

    The four of `cluster.published.FITTED` are fitted to published figures, on H100s; the others are assumptions.
    """

    matmul_flops: float = 0.64
    attention_flops: float = 0.50
    elementwise_bandwidth: float = 0.80
    prefill_flops: float = 0.50
    decode_bandwidth: float = 0.60
    link_bandwidth: float = 0.70
    decode_step_s: float = 3e-3
    decode_seed_s: float = 0.0
    layer_launch_s: float = 2.1e-3
    launch_overlap: float = 1.0
    step_s: float = 1.1
    collective_s: float = 20e-6
    host_copy_bytes_s: float = 4e9
    sync_tensor_s: float = 5e-4
    generation_batches: float = 2.0
    engine_overhead_gib: float = ENGINE_OVERHEAD_GIB
    reserved_gib: float = 4.0
    storage_bytes_s: float = 1e9


CONSTANT_TEXTS = {
    "matmul_flops": "trainer: share of peak FLOP/s in matrix products",
    "attention_flops": "trainer: share of peak FLOP/s in attention, over whole sequences",
    "elementwise_bandwidth": "trainer: share of memory bandwidth in norms, rotations, activations and the softmax",
    "prefill_flops": "vLLM: share of peak FLOP/s",
    "decode_bandwidth": "vLLM: share of memory bandwidth while decoding",
    "link_bandwidth": "collectives: share of the link's bandwidth",
    "decode_step_s": "vLLM: fixed seconds per decoding step",
    "decode_seed_s": "vLLM: seconds per request and step to draw by its own seed (Model Runner V2: one kernel for all)",
    "layer_launch_s": "trainer: seconds in which the host launches a layer's pass of a micro-batch",
    "launch_overlap": "trainer: share of launching that passes while the device computes",
    "step_s": "trainer: seconds per step outside of the layers (batch, packing, logging)",
    "collective_s": "collectives: seconds of latency per hop",
    "host_copy_bytes_s": "copies of the weights to host memory, bytes/s per GPU",
    "sync_tensor_s": "weight sync: seconds for each tensor, in which vLLM finds its place",
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
            matmul_flops=0.40,
            attention_flops=0.40,
            decode_seed_s=3e-5,
            layer_launch_s=2e-3,
            launch_overlap=0.0,
            step_s=0.05,
            collective_s=2e-4,
            host_copy_bytes_s=1e9,
            engine_overhead_gib=0.5,
            reserved_gib=0.5,
            storage_bytes_s=2e8,
        ),
    ),
}
