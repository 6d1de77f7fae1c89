"""The float32 values behind a model's weights: what an optimizer step changes and a rollback puts back.

Of bfloat16 weights these are Megatron's master weights, of which a rank holds its data-parallel part under the distributed
optimizer; float32 weights are their own. The weights the model computes with follow from them, by rounding.

Adam's moments and step count are not among them. A rollback ends its stage, and no stage inherits another's moments
(`Engine.reset_optimizer`): what a copy would bring back, at three times the memory, is forgotten in the same step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from torch import Tensor

from megatron_reheat.model.chunks import ModelChunks
from megatron_reheat.parallel.topology import Topology

Snapshot = dict[str, Tensor]  # by parameter name, in host memory


@dataclass(frozen=True)
class _Master:
    """`values` are the float32 elements of `parameter` from flat position `first` on, on the device."""

    parameter: Tensor
    values: Tensor
    first: int


@dataclass(frozen=True)
class Part:
    """`values` are float32 elements [n] of a parameter of this shape, from flat position `first` on, in host memory. Where it
    `is_split`, other replicas have the others."""

    name: str
    shape: torch.Size
    is_split: bool
    first: int
    values: Tensor


class MasterWeights:
    """This rank's master weights, after Megatron has wrapped `module` and built `optimizer`."""

    def __init__(
        self, module: ModelChunks, wrapped: Sequence[DistributedDataParallel], optimizer: Any, topology: Topology
    ) -> None:
        self._module, self._wrapped, self._topology = module, wrapped, topology
        self._optimizers = getattr(optimizer, "chained_optimizers", [optimizer])
        self._sharded = any(isinstance(o, DistributedOptimizer) for o in self._optimizers)
        starts = {
            id(parameter): sharding._get_model_param_range_map(parameter)["param"].start
            for sharding in self._optimizers
            if isinstance(sharding, DistributedOptimizer)
            for parameter in sharding.model_param_gbuf_map
        }
        self._masters: dict[str, _Master] = {}
        for name, parameter in module.named_parameters():
            if parameter.dtype == torch.float32:
                self._masters[name] = _Master(parameter, parameter.detach(), 0)
            elif (main := getattr(parameter, "main_param", None)) is not None:  # else other replicas hold all of it
                self._masters[name] = _Master(parameter, main, starts.get(id(parameter), 0))

    @property
    def names(self) -> Collection[str]:
        """The parameters of which this rank holds master weights, or a part of them."""
        return self._masters.keys()

    @torch.no_grad()
    def copy(self, into: Snapshot | None = None) -> Snapshot:
        """In page-locked memory beside a GPU, where the copies queue up and are waited for together.

        `into` is an earlier copy that is not needed any more; its memory is used again.
        """
        on_gpu = self._topology.device.type == "cuda"
        if into is None:
            into = {n: torch.empty(m.values.shape, pin_memory=on_gpu) for n, m in self._masters.items()}
        for name, master in self._masters.items():
            into[name].copy_(master.values, non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return into

    @torch.no_grad()
    def copy_of(self, name: str) -> Snapshot:
        """Of one parameter, where this rank holds some of its master weights."""
        return {n: master.values.cpu().clone() for n, master in self._masters.items() if n == name}

    @torch.no_grad()
    def put_back(self, snapshot: Snapshot) -> None:
        """Both the master weights and what follows from them, as after the step that made them. A collective.

        Parameters that `snapshot` does not name stay as they are.
        """
        for name, values in snapshot.items():
            self._masters[name].values.copy_(values, non_blocking=True)
        for optimizer in self._optimizers:
            if isinstance(optimizer, MixedPrecisionOptimizer) and not optimizer.is_stub_optimizer:
                optimizer._copy_main_params_to_model_params()
        if self._sharded:
            for chunk in self._wrapped:
                chunk.start_param_sync(force_sync=True)

    def parts(self, snapshot: Snapshot) -> list[Part]:
        """Of every parameter, this rank's part of a snapshot."""
        return [
            Part(
                name,
                parameter.shape,
                is_split=self._sharded and parameter.dtype != torch.float32,
                first=self._masters[name].first if name in snapshot else 0,
                values=snapshot[name].flatten() if name in snapshot else torch.empty(0),
            )
            for name, parameter in self._module.named_parameters()
        ]

    def part(self, weights: dict[str, Tensor]) -> Snapshot:
        """This rank's snapshot, from every parameter's values."""
        snapshot = {}
        for name, master in self._masters.items():
            values = weights[name].flatten()[master.first : master.first + master.values.numel()]
            snapshot[name] = values.view(master.values.shape).clone()
        return snapshot
