"""The policy of now as a Hugging Face folder, under any layout, while training stands still."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_reheat.checkpoint_folder import fsync
from megatron_reheat.errors import writing
from megatron_reheat.model.engine import Engine
from megatron_reheat.model.hf_weights import tensor_shapes
from megatron_reheat.model.hf_writer import write_hf_folder

SHARD_BYTES = 5_000_000_000


def export_policy(engine: Engine, out: Path, hf_folder: Path, stop_token_ids: tuple[int, ...]) -> None:
    """Writes weights, configuration and tokenizer to `out`, in the place of what lies there, once all is on the disk.

    A collective over all ranks; the run's main rank writes.

    Args:
        hf_folder: where the configuration and the tokenizer's files come from.

    Raises:
        ReheatError: it cannot be written.
    """
    if not engine.topology.is_main:
        for _ in engine.iter_hf_weights():  # the ranks of a replica produce the tensors together
            pass
        return
    partial, shapes = out.with_name(f".{out.name}.partial"), tensor_shapes(engine.hf)
    with writing(out):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_hf_folder(
            partial,
            _copies(engine),
            hf=engine.hf,
            source=hf_folder,
            shapes=shapes,
            dtypes=dict.fromkeys(shapes, engine.module.config.params_dtype),
            shard_bytes=SHARD_BYTES,
            stop_token_ids=stop_token_ids,
        )
        for path in (*partial.iterdir(), partial):
            fsync(path)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
        fsync(out.parent)


def _copies(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """The stream's tensors may be views of each other's memory, which safetensors does not write."""
    for name, tensor in engine.iter_hf_weights():
        yield name, tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
