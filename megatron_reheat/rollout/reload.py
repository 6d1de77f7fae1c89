"""The engine's end of a weight sync: checks what arrived, then hands it to vLLM's layerwise reload.

vLLM cannot undo a reload that met a tensor of the wrong shape, so every name, shape and digest is checked before vLLM
sees the tensor. After a sync that failed any check the model must not sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from megatron_reheat.errors import WeightSyncError
from megatron_reheat.rollout.packed import Entry, digest

NAMES_IN_MESSAGE = 5


class WeightLoader:
    """Loads Hugging Face named tensors into a vLLM model that lives in this process.

    One sync is `begin`, then any number of `load`, then `commit`.

    Args:
        model: vLLM's module, or this worker's part of it under tensor parallelism.
        model_path: Hugging Face folder or hub name, for the names and shapes to expect.
    """

    def __init__(self, model: torch.nn.Module, vllm_config: Any, model_path: str) -> None:
        self._model: Any = model
        self._vllm_config = vllm_config
        hf_config = AutoConfig.from_pretrained(model_path)
        self._tied = bool(hf_config.tie_word_embeddings)
        self._expected = _hf_shapes(hf_config)
        self._received: dict[str, int] = {}
        self._problems: list[str] = []
        self._corrupted: list[str] = []
        self._reloading = False

    def begin(self) -> None:
        """Starts a sync; from here on the model cannot be used until `commit`."""
        self._received = {}
        self._problems = []
        self._corrupted = []
        if self._reloading:
            # a sync that was given up left layers half loaded, and vLLM would count those tensors towards the new one
            self._finalize()
        with torch.no_grad(), set_current_vllm_config(self._vllm_config):
            initialize_layerwise_reload(self._model)
        self._reloading = True

    def load(self, items: Iterable[tuple[Entry, torch.Tensor]]) -> None:
        """Loads tensors; problems are kept for `commit` to report.

        vLLM keeps the tensors of a layer until the layer is complete: see `release`.
        """
        good = [(entry.name, tensor) for entry, tensor in items if self._check(entry, tensor)]
        if self._problems or self._corrupted:
            return
        with torch.no_grad(), set_current_vllm_config(self._vllm_config):
            self._model.load_weights(iter(good))

    def release(self, holds: Callable[[torch.Tensor], bool]) -> None:
        """Copies the waiting tensors for which `holds` is true, whose memory is about to be overwritten.

        A fused projection, for one, needs q, k and v. At most a few layers wait when tensors come in layer order.
        """
        for layer in self._model.modules():
            for _, call in get_layerwise_info(layer).loaded_weights:
                for name, value in call.arguments.items():
                    if isinstance(value, torch.Tensor) and holds(value):
                        call.arguments[name] = value.clone()

    def commit(self) -> tuple[int, int]:
        """Makes the received weights the model's; returns the number of tensors and of bytes received.

        Raises:
            WeightSyncError: naming the tensors that were wrong or missing.
        """
        self._finalize()
        self.check()
        return len(self._received), sum(self._received.values())

    def check(self) -> None:
        """Whether what was received is the whole model and nothing else.

        Raises:
            WeightSyncError: naming the tensors that were wrong or missing.
        """
        if self._problems:
            raise WeightSyncError(f"weight sync refused: {_some(self._problems, '; ')}")
        if self._corrupted:
            raise WeightSyncError(f"these tensors changed between trainer and engine: {_some(self._corrupted)}")
        missing = sorted(self._expected.keys() - self._received.keys())
        if missing:
            raise WeightSyncError(f"the trainer did not send these parameters: {_some(missing)}")

    def _check(self, entry: Entry, tensor: torch.Tensor) -> bool:
        if self._tied and entry.name == "lm_head.weight":
            return False  # the embedding under its second name
        problem = self._problem(entry)
        if problem is not None:
            self._problems.append(problem)
            return False
        self._received[entry.name] = tensor.nbytes
        if entry.digest is not None and digest(entry.name, tensor) != entry.digest:
            self._corrupted.append(entry.name)
        return True

    def _problem(self, entry: Entry) -> str | None:
        expected = self._expected.get(entry.name)
        if expected is None:
            return f"{entry.name} is not a parameter of the model"
        if expected != entry.shape:
            return f"{entry.name} has shape {entry.shape}, the engine needs {expected}"
        if entry.name in self._received:
            return f"{entry.name} was sent twice"
        return None

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
