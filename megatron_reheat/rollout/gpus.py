"""Which GPUs there are, by the names that a child process needs to see them."""

from __future__ import annotations

import os

import torch


def visible_gpus() -> tuple[str, ...]:
    """The GPUs this process may use, each by the name that CUDA_VISIBLE_DEVICES has for it; makes no CUDA context."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else map(str, range(count))
    return tuple(name.strip() for name in names)[:count]
