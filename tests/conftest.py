"""Conditions that every test runs under: one thread per process, no network, and no CUDA unless `-m gpu` asks for it.

`pytest` gives the same CPU run on every machine; `pytest -m gpu` runs those that need a CUDA device, nothing else.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator

import pytest

from megatron_reheat.large_imports import large_imports


def pytest_configure(config: pytest.Config) -> None:
    # Before any test module imports torch, which reads these once; child processes inherit them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("WANDB_MODE", "disabled")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if config.getoption("markexpr").strip() != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    with large_imports():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch  # only here: a run without GPU tests need not pay for the import

    if torch.cuda.is_available():
        return
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason="no CUDA device (on a GPU machine: pytest -m gpu)"))


@pytest.fixture(autouse=True)
def signals_are_not_held_beyond_a_test() -> Iterator[None]:
    """The command line blocks the signals it awaits, for good: later tests, and what they start, would inherit that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
