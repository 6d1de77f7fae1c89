"""The CPU backend: the smallest explicit change that lets unmodified Megatron-Core run over gloo.

Megatron-Core has no CPU path: a few of its modules name CUDA devices and types literally, and call `torch.cuda` functions
that can only raise without a GPU. `install()` gives those, and nothing else, a CPU meaning:

1. `torch.cuda` functions: current device, synchronisation, streams, random state;
2. `Tensor.cuda()` returns the tensor;
3. the literals ``'cuda'`` and ``'torch.cuda.FloatTensor'`` inside the modules of `CUDA_LITERAL_MODULES`. The constants of the
   compiled functions are replaced, so it costs nothing at run time and holds in backward passes and in threads;
4. Megatron's `_set_cuda_rng_state`, which defers to CUDA's lazy initialisation and would silently never run.

And it has the C library keep memory that tensors gave back (`keep_memory`), as CUDA's allocator does.

It is installed once, before a model is built, and only where there is no accelerator; a GPU run never sees it.
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch

CUDA_LITERAL_MODULES = (
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
)

# glibc's mallopt() parameters (malloc.h): when freed memory at the heap's end goes back, by how much the heap grows, and from
# which size on an allocation is a mapping of its own, which goes back whenever it is freed
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGEST = 2**31 - 1  # bytes; the values are C ints
HEAP_STEP = 1 << 28

_installed = False


def install() -> bool:
    """Installs the CPU backend where no accelerator is present.

    Returns:
        True if Megatron now runs on CPU, False if there is an accelerator and nothing was touched.

    Raises:
        RuntimeError: this megatron-core no longer has a literal we expect, so the list above needs review.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if _installed:
        return True
    keep_memory()
    _give_cuda_functions_a_cpu_meaning()
    for name in CUDA_LITERAL_MODULES:
        if not _retarget_module(name):
            import megatron.core

            raise RuntimeError(
                f"megatron-core {megatron.core.__version__}: no CUDA literal found in {name}; the CPU backend was written "
                "for 0.16 to 0.19, install one of those or run on a GPU"
            )
    from megatron.core.tensor_parallel import random as megatron_random

    def set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    megatron_random._set_cuda_rng_state = set_rng_state
    _installed = True
    return True


def keep_memory() -> None:
    """Has this process keep what tensors of up to 2 GiB gave back, for the next ones.

    By default every large tensor is a mapping of its own, which the system hands out page by page, zeroed: a chunk of logits
    then costs more to allocate than to fill. Does nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in (
            (M_MMAP_THRESHOLD, LARGEST),
            (M_TRIM_THRESHOLD, LARGEST),
            (M_TOP_PAD, HEAP_STEP),
        ):
            mallopt(parameter, value)


def _give_cuda_functions_a_cpu_meaning() -> None:
    # One function object per name: torch.compile refuses to see the same object under two names.
    def current_device() -> torch.device:
        return torch.device("cpu")

    def synchronize(device: Any = None) -> None:
        return None

    def current_stream(device: Any = None) -> Any:
        return torch.cpu.current_stream()

    def get_rng_state(device: Any = "cuda") -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
        torch.set_rng_state(new_state)

    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    for function in (current_device, synchronize, current_stream, get_rng_state, set_rng_state, manual_seed):
        setattr(torch.cuda, function.__name__, function)
        if hasattr(torch.cuda.random, function.__name__):
            setattr(torch.cuda.random, function.__name__, function)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _retarget_module(name: str) -> int:
    """Points the CUDA literals of one module at the CPU; returns how many functions changed."""
    changed = 0
    for function in _functions_of(importlib.import_module(name), name):
        code = _retarget_code(function.__code__)
        if code is not function.__code__:
            function.__code__ = code
            changed += 1
    return changed


def _functions_of(namespace: Any, module: str) -> Iterator[types.FunctionType]:
    """Every function defined in `module`: methods, static methods and the insides of decorators included."""
    for member in list(vars(namespace).values()):
        member = getattr(member, "__func__", member)
        if inspect.isclass(member):
            if member.__module__ == module:
                yield from _functions_of(member, module)
            continue
        while member is not None:
            if isinstance(member, types.FunctionType) and member.__module__ == module:
                yield member
            member = getattr(member, "__wrapped__", None)


def _retarget_code(code: types.CodeType) -> types.CodeType:
    constants = tuple(_retarget_constant(c) for c in code.co_consts)
    return code if constants == code.co_consts else code.replace(co_consts=constants)


def _retarget_constant(constant: Any) -> Any:
    if isinstance(constant, types.CodeType):
        return _retarget_code(constant)
    if isinstance(constant, tuple):
        return tuple(_retarget_constant(c) for c in constant)
    if constant == "cuda":
        return "cpu"
    if isinstance(constant, str) and constant.startswith("torch.cuda.") and constant.endswith("Tensor"):
        return constant.replace("torch.cuda.", "torch.", 1)
    return constant
