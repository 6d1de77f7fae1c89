"""Single tensors out of a checkpoint, in one process, whatever layout wrote it and without a model to load them into."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_reheat.errors import ReheatError
from megatron_reheat.model.checkpoint import use_instead
from megatron_reheat.model.checkpoint_pickles import explain, read_metadata


class CheckpointReader:
    """The model's tensors of a verified checkpoint as Megatron names them; opening reads the list of them only.

    Megatron stores a tensor whole, in the layout of tensor parallel size 1, in as many chunks as there were ranks. The
    layers' tensors of one name may be stacked: `decoder.layers.mlp.linear_fc2.weight` is then [layers, ...].
    """

    def __init__(self, checkpoint: Path) -> None:
        self._files = FileSystemReader(checkpoint)
        metadata = read_metadata(checkpoint)
        self._files.set_up_storage_reader(metadata, is_coordinator=True)
        self._stored: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
        }
        self.checkpoint = checkpoint
        self.shapes = {name: tuple(entry.size) for name, entry in self._stored.items()}

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored."""
        return self._stored[name].properties.dtype

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the first dimension.

        Raises:
            ReheatError: the checkpoint does not hold all of them, or they cannot be read.
        """
        stored = self._stored[name]
        rows = torch.empty(stop - start, *stored.size[1:], dtype=stored.properties.dtype)
        wanted = ChunkStorageMetadata(torch.Size([start, *[0] * (rows.dim() - 1)]), rows.shape)
        items = create_read_items_for_chunk_list(name, stored, [wanted])
        if sum(math.prod(item.lengths) for item in items) != rows.numel():
            raise ReheatError(f"{self.checkpoint} holds {name} in part only; {use_instead(self.checkpoint)}")
        try:
            self._files.read_data(LoadPlan(items), _Into(rows)).wait()
        except Exception as error:  # whatever a wrong place in a file leads to
            reason = f"{name} cannot be read ({type(error).__name__}: {explain(error)})"
            raise ReheatError(f"{self.checkpoint}: {reason}; {use_instead(self.checkpoint)}") from None
        return rows


class _Into(DefaultLoadPlanner):
    """Every item read goes to its place in one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._target
