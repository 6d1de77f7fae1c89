"""The weights of a Hugging Face folder: which files hold which tensor, and the tensors, read one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_reheat.errors import ConfigError, ReheatError
from megatron_reheat.files import NO_SUCH_FILE, problem_of_file
from megatron_reheat.model.provider import ADAPTER, MERGE_ADAPTER

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class HFReader:
    """Random access to the tensors of a Hugging Face folder, sharded or not, read lazily.

    Raises:
        ConfigError: the folder holds no safetensors, a file of them is missing or damaged, or index and files disagree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        indexed = self._read_index()
        self._files: dict[str, str] = {}
        for file in sorted(set(indexed.values())) or [SINGLE_FILE]:
            names = self._file(file).keys()
            for name in names:
                if name in self._files:
                    raise ConfigError(
                        f"model.hf_path: {folder}: {self._files[name]} and {file} both hold {name}; remove what is not a "
                        "part of the model, or save it again"
                    )
                self._files[name] = file
        if set(indexed.values()) - {SINGLE_FILE} and (folder / SINGLE_FILE).is_file():
            raise ConfigError(
                f"model.hf_path: {folder} holds {SINGLE_FILE} beside the files that {INDEX} names; remove what is out of date"
            )
        if stale := [name for name, file in indexed.items() if self._files.get(name) != file]:
            raise ConfigError(
                f"model.hf_path: {folder / INDEX} is out of date: it has {stale[0]} in {indexed[stale[0]]}, which does not "
                "hold it; remove the index if one file is the whole model, or save the model again"
            )

    def names(self) -> set[str]:
        """Of the tensors in all files."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header, like `dtype`."""
        return tuple(self._file(self._files[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors spells it: F32, BF16, F8_E4M3, ..."""
        return self._file(self._files[name]).get_slice(name).get_dtype()

    def get(self, name: str) -> Tensor:
        """The full tensor.

        Raises:
            ReheatError: it holds a value that is not finite.
        """
        tensor = self._file(self._files[name]).get_tensor(name)
        # one pass at the speed of memory, which isfinite() is far from
        if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
            raise ReheatError(
                f"model.hf_path: {self.folder / self._files[name]}: {name} holds NaN or infinite values; copy or download "
                "the model again"
            )
        return tensor

    def _read_index(self) -> dict[str, str]:
        """Tensor -> file, as the index says; {} where there is none."""
        folder, index = self.folder, self.folder / INDEX
        if (folder / ADAPTER).is_file():
            raise ConfigError(f"model.hf_path: {folder} holds an adapter ({ADAPTER}); {MERGE_ADAPTER}")
        if not index.is_file():
            if not (folder / SINGLE_FILE).is_file():
                raise ConfigError(
                    f"model.hf_path: {folder} has no {SINGLE_FILE} and no index of shards; save the model as safetensors"
                )
            return {}
        try:
            files: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
            outside = [
                f for f in set(files.values()) if f.startswith("/") or ".." in f.split("/") or "\0" in f or not f
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            files = {}
        if not files:
            raise ConfigError(f"model.hf_path: {index} is damaged; copy or download the model again")
        if outside:
            raise ConfigError(
                f"model.hf_path: {index} names {outside[0]}, which is outside of the folder; copy the whole model into it"
            )
        return files

    def _file(self, name: str) -> Any:
        """An open file; opening reads its header only."""
        if name not in self._open:
            path = self.folder / name
            if problem := problem_of_file(path):
                named = problem.startswith(NO_SUCH_FILE)
                problem = (
                    f"{INDEX} names it, but there is no such file; remove the index if it is out of date"
                    if named
                    else problem
                )
                raise ConfigError(
                    f"model.hf_path: {path} cannot be read: {problem}, or copy or download the model again"
                )
            try:
                self._open[name] = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise ConfigError(
                    f"model.hf_path: {path} cannot be read ({error}); copy or download the model again"
                ) from None
        return self._open[name]
