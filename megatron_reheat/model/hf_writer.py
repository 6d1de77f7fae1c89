"""Writes a Hugging Face folder from a stream of named tensors: one shard at a time is in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from megatron_reheat.model.hf_reader import INDEX

# what a model folder may hold besides weights and config.json; transformers reads whichever are there
COPIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def write_hf_folder(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    hf: Any,
    source: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    shard_bytes: int,
    stop_token_ids: Sequence[int],
) -> None:
    """Weights, index, config.json, generation_config.json and the tokenizer's files, into an existing folder.

    A generation configuration is kept as it is; where there is none, the one written ends at `stop_token_ids`.

    Args:
        tensors: on the CPU, each of the names in `shapes` and `dtypes` once.
        hf: the model's configuration.
        source: the folder that configuration and tokenizer come from.
    """
    config = json.loads((source / "config.json").read_text())
    # transformers 4 wrote torch_dtype; the rest stays as it was, for whatever version reads it
    dtype = str(next(iter(dtypes.values()))).removeprefix("torch.")
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    if str(config.get("_name_or_path", "")).startswith("/"):
        del config["_name_or_path"]  # transformers 4 wrote where it lay on some machine
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_model_config(hf)
        generation.eos_token_id = list(stop_token_ids)
        generation.save_pretrained(folder)
    meta = {n: torch.empty(s, dtype=dtypes[n], device="meta") for n, s in shapes.items()}
    split = split_torch_state_dict_into_shards(meta, max_shard_size=shard_bytes)
    _write_shards(folder, tensors, split)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
    for file in split.filename_to_tensors:  # safetensors lets the owner alone read them
        shutil.copymode(folder / "config.json", folder / file)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], split: StateDictSplit) -> None:
    begun: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        file = split.tensor_to_filename[name]
        begun.setdefault(file, {})[name] = tensor
        del tensor
        if len(begun[file]) == len(split.filename_to_tensors[file]):
            save_file(begun.pop(file), folder / file, metadata={"format": "pt"})
    assert not begun
