"""The pickles inside a checkpoint, read so that no code in them can run: somebody else's run folder is data, not a program.

Three kinds of file hold them. `.metadata` lists the tensors, `common.pt` holds plain values, and `*.distcp` may hold objects
among its tensors. torch unpickles the first and the last without restriction.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

METADATA = ".metadata"
_COMMON = "common.pt"
_LONGEST = 300  # characters of a reason
# what torch and Megatron write into `.metadata`: records, enumerations and the types of their fields
_KNOWN = {
    "builtins": {"set"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(_names_code(f"{module}.{name}"))
        return super().find_class(module, name)


def read_metadata(checkpoint: Path) -> Metadata:
    """The list of a checkpoint's tensors.

    Raises:
        pickle.UnpicklingError: it is not such a list, or holds something besides.
        OSError: it cannot be read.
    """
    try:
        with (checkpoint / METADATA).open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except (OSError, pickle.UnpicklingError):
        raise
    except Exception as error:  # whatever broken bytes lead to
        raise pickle.UnpicklingError(f"it cannot be read ({type(error).__name__}: {error})") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise pickle.UnpicklingError("it is not a list of tensors")
    for stored in metadata.storage_data.values():
        if Path(stored.relative_path).name != stored.relative_path:
            raise pickle.UnpicklingError(f"it points at {stored.relative_path}, outside the checkpoint")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
            raise pickle.UnpicklingError(f"it holds {name} in part only")  # of which torch would fill just that part
    return metadata


def find_unsafe_pickle(checkpoint: Path) -> str | None:
    """What makes a checkpoint one that must not be read; None if there is nothing. Tensors are not looked at."""
    path = checkpoint / METADATA
    try:
        read_metadata(checkpoint)
        path = checkpoint / _COMMON
        if path.exists():  # a checkpoint without an optimizer may lack it
            with no_code():
                torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        return f"{path} is refused: {explain(error)}"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    except Exception as error:  # whatever broken bytes lead to
        return f"{path} is refused: it cannot be read ({type(error).__name__})"
    return None


@contextmanager
def no_code() -> Iterator[None]:
    """Inside, torch and Megatron read a checkpoint's pickles as this module does."""
    with (
        mock.patch.object(FileSystemReader, "read_metadata", _read_own_metadata),
        mock.patch.dict(os.environ, {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}),
    ):
        yield


def _read_own_metadata(reader: FileSystemReader, *_: Any, **__: Any) -> Metadata:
    metadata = read_metadata(Path(reader.path))
    if metadata.storage_meta is None:
        metadata.storage_meta = StorageMeta()
    metadata.storage_meta.load_id = reader.load_id
    return metadata


def explain(error: BaseException) -> str:
    """torch says it in a page, part of it on how to run the code nevertheless."""
    if found := re.search(r"GLOBAL ([\w.]+)", text := str(error).strip()):
        return _names_code(found[1])
    if text.startswith("Weights only load failed"):
        return "its bytes are not what torch has written"
    return text.splitlines()[0][:_LONGEST] if text else type(error).__name__


def _names_code(name: str) -> str:
    return f"it names {name}, which may run code when it is read"
