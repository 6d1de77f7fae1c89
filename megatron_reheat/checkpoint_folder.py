"""Which folders under `checkpoints/` are checkpoints, and which of them `latest` and `best` name. No tensor is touched here.

A checkpoint is a folder `step-<number>`, the number as a run writes it: `step-3-backup` and `step-03` are somebody's own.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from megatron_reheat.errors import ReheatError

LATEST = "latest"
BEST = "best"
_NAME = re.compile(r"step-(0|[1-9][0-9]{0,17})", re.ASCII)
_LONGEST = 60  # of what a pointer holds


def checkpoint_step(path: Path) -> int | None:
    """The step that a checkpoint's folder is named for; None when it is not one by its name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest step first."""
    steps = {path: step for path in folder.glob("step-*") if (step := checkpoint_step(path)) is not None}
    return sorted((path for path in steps if path.is_dir()), key=steps.__getitem__)


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to go on from: the one that `latest` names if it is there, else that of the newest step, or None.

    Raises:
        ReheatError: `latest` holds something other than a checkpoint's name.
    """
    complete = list_checkpoints(folder)
    if name := _read_pointer(folder, LATEST):
        named = folder / name
        if named.parent != folder or checkpoint_step(named) is None:
            raise ReheatError(
                f"{folder / LATEST} names {name!r}, which is not a checkpoint: they are folders beside it called "
                "step-<number>; write the name of one into the file, or remove the file for the newest"
                + (f" ({complete[-1]})" if complete else "")
            )
        if named.is_dir():
            return named
    return complete[-1] if complete else None


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint under `folder` with the best evaluation, or None when none was kept as that."""
    name = _read_pointer(folder, BEST)
    named = folder / name
    return named if name and named.parent == folder and named.is_dir() else None


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints and those that `latest` and `best` name."""
    named = (latest_checkpoint(folder), best_checkpoint(folder))
    for old in list_checkpoints(folder)[:-keep]:
        if old not in named:
            _remove(old)


def set_aside(checkpoint: Path) -> Path:
    """Renames a checkpoint, so that it is none any more and stays; `best` follows it. Returns its new place."""
    folder, number = checkpoint.parent, 1
    was_best = best_checkpoint(folder) == checkpoint
    while os.path.lexists(place := folder / f"{checkpoint.name}.set-aside-{number}"):
        number += 1
    checkpoint.rename(place)
    if was_best:
        point(folder, BEST, place.name)
    return place


def set_newer_aside(checkpoint: Path) -> list[Path]:
    """Sets aside the checkpoints beside this one of later steps: a run that goes on from here makes these steps anew."""
    beside = list_checkpoints(checkpoint.parent)
    newer = beside[beside.index(checkpoint) + 1 :]
    return [set_aside(path) for path in newer]


def point(folder: Path, pointer: str, name: str) -> None:
    """Lets `latest` or `best` name a checkpoint; a kill leaves the old name or the new."""
    temporary = folder / f".{pointer}.partial"
    temporary.write_text(name)
    fsync(temporary)
    os.replace(temporary, folder / pointer)
    fsync(folder)


def fsync(path: Path) -> None:
    """Returns when the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(checkpoint: Path) -> None:
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    # under another name first: killed in between, what is left would look like a checkpoint
    partial = checkpoint.with_name(f".{checkpoint.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    checkpoint.rename(partial)
    shutil.rmtree(partial)


def _read_pointer(folder: Path, pointer: str) -> str:
    """Empty when there is no such file, and cut where no checkpoint's name is so long."""
    path = folder / pointer
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return file.read(_LONGEST).decode(errors="replace").strip()
