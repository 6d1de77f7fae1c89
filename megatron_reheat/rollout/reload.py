"""The engine's end of a weight sync: checks what arrived, then hands it to vLLM's layerwise reload.

vLLM cannot undo a reload that met a tensor of the wrong shape, so every name, shape and digest is checked before vLLM
sees the tensor. A sync that fails any check leaves the loader without a version, and without one nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import LLMEngine
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from megatron_reheat.errors import WeightSyncError
from megatron_reheat.rollout.shared_memory import Entry, SharedBuffer, digest

NAMES_IN_MESSAGE = 5


class WeightLoader:
    """Loads Hugging Face named tensors into a vLLM engine that lives in this process.

    One sync is `begin`, then any number of `load` and `recycle`, then `commit`.
    """

    def __init__(self, engine: LLMEngine, model_path: str, buffer: SharedBuffer) -> None:
        self.version: int | None = None
        self._engine = engine
        self._buffer = buffer
        worker: Any = engine.collective_rpc(lambda worker: worker)[0]
        self._vllm_config = worker.vllm_config
        self._model = worker.model_runner.get_model()
        hf_config = AutoConfig.from_pretrained(model_path)
        self._tied = bool(hf_config.tie_word_embeddings)
        self._expected = _hf_shapes(hf_config)
        self._received: dict[str, int] = {}
        self._problems: list[str] = []
        self._corrupted: list[str] = []
        self._reloading = False

    def begin(self, capacity: int) -> None:
        """Starts a sync through a buffer of `capacity` bytes; from here on there is no version until `commit`."""
        self.version = None
        self._buffer.resize(capacity)
        self._received = {}
        self._problems = []
        self._corrupted = []
        if self._reloading:
            # a sync that was given up left layers half loaded, and vLLM would count those tensors towards the new one
            self._finalize()
        with torch.no_grad(), set_current_vllm_config(self._vllm_config):
            initialize_layerwise_reload(self._model)
        self._reloading = True

    def load(self, entries: Sequence[Entry]) -> None:
        """Loads tensors that lie in the shared buffer; problems are kept for `commit` to report."""
        good = [item for entry in entries if (item := self._check(entry)) is not None]
        if self._problems or self._corrupted:
            return
        with torch.no_grad(), set_current_vllm_config(self._vllm_config):
            self._model.load_weights(iter(good))

    def recycle(self, capacity: int) -> None:
        """The sender is about to overwrite the buffer, and may be growing it to `capacity` bytes.

        vLLM keeps the tensors of a layer until the layer is complete (a fused projection needs q, k and v), so those
        still waiting are copied out first. That is at most a few layers when tensors come in layer order.
        """
        for layer in self._model.modules():
            for _, call in get_layerwise_info(layer).loaded_weights:
                for name, value in call.arguments.items():
                    if isinstance(value, torch.Tensor) and self._buffer.holds(value):
                        call.arguments[name] = value.clone()
        self._buffer.resize(capacity)

    def commit(self, version: int) -> tuple[int, int]:
        """Makes the received weights the engine's; returns the number of tensors and of bytes received.

        Raises:
            WeightSyncError: naming the tensors that were wrong or missing.
        """
        missing = sorted(self._expected.keys() - self._received.keys())
        self._finalize()
        self._raise_problems(missing)
        if not self._engine.reset_prefix_cache():
            raise WeightSyncError("the engine could not drop its prefix cache because requests are still running")
        self.version = version
        return len(self._received), sum(self._received.values())

    def _check(self, entry: Entry) -> tuple[str, torch.Tensor] | None:
        if self._tied and entry.name == "lm_head.weight":
            return None  # the embedding under its second name
        problem = self._problem(entry)
        if problem is not None:
            self._problems.append(problem)
            return None
        tensor = self._buffer.read(entry)
        self._received[entry.name] = tensor.nbytes
        if entry.digest is not None and digest(entry.name, tensor) != entry.digest:
            self._corrupted.append(entry.name)
        return entry.name, tensor

    def _problem(self, entry: Entry) -> str | None:
        expected = self._expected.get(entry.name)
        if expected is None:
            return f"{entry.name} is not a parameter of the model"
        if expected != entry.shape:
            return f"{entry.name} has shape {entry.shape}, the engine needs {expected}"
        if entry.name in self._received:
            return f"{entry.name} was sent twice"
        return None

    def _raise_problems(self, missing: list[str]) -> None:
        if self._problems:
            raise WeightSyncError(f"weight sync refused: {_some(self._problems, '; ')}")
        if self._corrupted:
            raise WeightSyncError(f"these tensors changed between trainer and engine: {_some(self._corrupted)}")
        if missing:
            raise WeightSyncError(f"the trainer did not send these parameters: {_some(missing)}")

    def _finalize(self) -> None:
        with torch.no_grad(), set_current_vllm_config(self._vllm_config):
            finalize_layerwise_reload(self._model, self._vllm_config.model_config)
            self._repack_tied_head()
        self._reloading = False

    def _repack_tied_head(self) -> None:
        # on CPU the head multiplies with its own packed copy, which a reload of the embedding alone leaves stale
        head: Any = getattr(self._model, "lm_head", None)
        if self._tied and hasattr(head, "cpu_linear"):
            head.quant_method.process_weights_after_loading(head)


def _hf_shapes(hf_config: AutoConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _some(items: Iterable[str], separator: str = ", ") -> str:
    items = list(items)
    more = f" and {len(items) - NAMES_IN_MESSAGE} more" if len(items) > NAMES_IN_MESSAGE else ""
    return separator.join(items[:NAMES_IN_MESSAGE]) + more
