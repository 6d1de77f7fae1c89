"""A second set of weights in host memory, which takes the place of the model's own for a forward pass.

What is kept are the parameters in their own dtype, which is what forward passes read; the optimizer and its master weights
never see the exchange.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_reheat.model.chunks import ModelChunks
from megatron_reheat.model.hf_reader import HFReader
from megatron_reheat.model.hf_weights import load_hf_weights
from megatron_reheat.parallel.topology import Topology


class FrozenWeights:
    """This rank's parameters of `module` (unwrapped), as they are when this is made.

    Beside a GPU the memory is page-locked.
    """

    @torch.no_grad()
    def __init__(self, module: ModelChunks, topology: Topology) -> None:
        self._on_gpu = topology.device.type == "cuda"
        self._parameters = dict(module.named_parameters())
        self._held: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            self._held[name] = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=self._on_gpu)
            self._held[name].copy_(parameter, non_blocking=True)
        self._wait()

    @classmethod
    def of_folder(cls, folder: Path, module: ModelChunks, topology: Topology) -> FrozenWeights:
        """Those of a Hugging Face folder that fits `module`, which keeps its own."""
        frozen = cls(module, topology)
        load_hf_weights(module, HFReader(folder), topology)
        frozen._exchange()
        return frozen

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has these weights; afterwards its own again, to the bit. The optimizer must not step inside."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Host memory holds whichever weights are out: a second copy is not needed for it."""
        for name, parameter in self._parameters.items():
            ours = parameter.clone()
            parameter.copy_(self._held[name], non_blocking=True)
            self._held[name].copy_(ours, non_blocking=True)
        self._wait()

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()
