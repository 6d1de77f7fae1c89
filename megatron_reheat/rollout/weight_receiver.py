"""Mixed into vLLM's workers (`worker_extension_cls`): each takes weights out of the trainer's buffer and loads its part.

vLLM calls these methods by name in every worker, in this process or, under tensor parallelism, in others; what they
return and raise may have to cross a process border, so problems the user can act on are returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_reheat.errors import WeightSyncError
from megatron_reheat.rollout.packed import Entry
from megatron_reheat.rollout.reload import WeightLoader
from megatron_reheat.rollout.weight_buffer import OpenBuffer, Source


class WeightReceiver:
    """One sync is `begin`, then any number of `load` and `recycle`, then `commit`."""

    model_runner: Any
    vllm_config: Any
    _reheat_loader: WeightLoader
    _reheat_buffer: OpenBuffer | None = None

    def reheat_begin(self, source: Source) -> None:
        """Starts a sync through the buffer, which stays open for the syncs to come."""
        if self._reheat_buffer is None:
            path = self.vllm_config.model_config.model
            self._reheat_loader = WeightLoader(self.model_runner.get_model(), self.vllm_config, path)
        self._reheat_loader.begin()
        self._reheat_open(source)

    def reheat_load(self, entries: Sequence[Entry]) -> None:
        """Loads this worker's part; wrong names, shapes and digests are told by `reheat_commit`."""
        assert self._reheat_buffer is not None
        self._reheat_loader.load([(entry, self._reheat_buffer.read(entry)) for entry in entries])

    def reheat_recycle(self, source: Source) -> None:
        """The sender is about to overwrite the buffer, or to replace it."""
        assert self._reheat_buffer is not None
        self._reheat_loader.release(self._reheat_buffer.holds)
        _wait_for_device()
        self._reheat_open(source)

    def reheat_commit(self) -> tuple[int, int] | str:
        """The numbers of tensors and bytes received, or what was wrong with them."""
        try:
            received = self._reheat_loader.commit()
        except WeightSyncError as error:
            return str(error)
        _wait_for_device()
        return received

    def _reheat_open(self, source: Source) -> None:
        if self._reheat_buffer is None or self._reheat_buffer.source != source:
            self._reheat_buffer = OpenBuffer(source)


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
