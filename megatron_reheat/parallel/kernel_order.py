"""The order in which a GPU starts what is queued for it: `CUDA_DEVICE_MAX_CONNECTIONS`, to be set before CUDA is used.

Imports neither torch nor Megatron, so that a launcher can ask, whose ranks inherit the variable.
"""

from __future__ import annotations

import ctypes
import os

from megatron_reheat.config import Config

BLACKWELL = 10  # major compute capability


def order_kernels(config: Config) -> None:
    """Sets the variable where Megatron counts on it. Whoever sets it before knows better."""
    ranks = config.parallel.tensor * config.parallel.context
    if ranks > 1 and needs_one_queue(ranks, gpu_architecture()):
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def needs_one_queue(ranks: int, architecture: int | None) -> bool:
    """Whether kernels have to start in the order in which they are queued.

    With tensor or context parallelism, over `ranks` together, Megatron queues a collective before the matrix product that it
    overlaps with, and up to Hopper only a single queue keeps the product from taking the whole GPU first. From Blackwell on it
    asks for nothing (Megatron's `validate_args`), and a single queue would only hold up the gradients' collectives. Data
    parallelism alone never needs it.
    `architecture` is the GPU's major compute capability, None where nobody knows.
    """
    return ranks > 1 and (architecture is None or architecture < BLACKWELL)


def gpu_architecture() -> int | None:
    """Major compute capability of this machine's oldest GPU, from the driver's NVML, as torch could not say without CUDA; None
    where there is no answer."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    count, device, major, minor = ctypes.c_uint(), ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    found = []
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    for index in range(count.value):
        failed = nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device))
        if not failed and not nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)):
            found.append(major.value)
    nvml.nvmlShutdown()
    return min(found, default=None)
