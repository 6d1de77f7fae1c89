"""Checkpoints whose pickles would run code when they are read: here, make a folder, which tests then look for."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_reheat.model.checkpoint import digest


class Payload:
    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


def instead_of_metadata(checkpoint: Path, made: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Payload(made)))


def inside_metadata(checkpoint: Path, made: Path) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data = [Payload(made)]
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def inside_common(checkpoint: Path, made: Path) -> None:
    torch.save({"optimizer": Payload(made)}, checkpoint / "common.pt")


def inside_objects(checkpoint: Path, made: Path) -> None:
    """Among the tensors: every object that Megatron stored there is replaced."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    stored = io.BytesIO()
    torch.save([Payload(made)], stored)
    places = [
        place
        for index, place in metadata.storage_data.items()
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata)
    ]
    assert places
    for place in places:
        with (checkpoint / place.relative_path).open("ab") as file:
            place.offset, place.length = file.tell(), file.write(stored.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def pointing_outside(checkpoint: Path, made: Path) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = f"../{checkpoint.name}/{place.relative_path}"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


PAYLOADS: dict[str, Callable[[Path, Path], None]] = {
    "instead of .metadata": instead_of_metadata,
    "inside .metadata": inside_metadata,
    "inside common.pt": inside_common,
    "inside the objects": inside_objects,
    "pointing outside": pointing_outside,
}
REASONS = {
    "instead of .metadata": ".metadata is refused: it names posix.mkdir",
    "inside .metadata": ".metadata is refused: it names posix.mkdir",
    "inside common.pt": "common.pt is refused: it names posix.mkdir",
    "inside the objects": "step-2 cannot be read: it names posix.mkdir",
    "pointing outside": ".metadata is refused: it points at ../",
}


def tamper(checkpoint: Path, payload: str, made: Path) -> None:
    """With a manifest that fits, as whoever wrote the payload would leave it."""
    PAYLOADS[payload](checkpoint, made)
    (checkpoint / "manifest.json").unlink()
    files = (path for path in checkpoint.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(checkpoint)): digest(path) for path in files}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
