"""A save of a checkpoint on a disk that fails, or loses power, at every single call that changes it.

    python -m scripts.faults.crash_points [--every N] [--calls]

One process with real Megatron-Core saves step-2, and then, keeping one checkpoint, step-4 again and again. `failing_disk.c`
lies between it and the disk: below Python, torch's C++ and Megatron alike.

1. Errors: from the n-th call on the disk is full (ENOSPC), over quota (EDQUOT) or read-only (EROFS), or only the n-th call
   fails (EIO), for every n. The save has to end in one sentence, what is a checkpoint by its name has to be whole, the one to
   go on from has to be there, and where something is left the next save has to clear it.
2. Power: after the n-th call everything is lost that was not synced, and of what was done to folders since they were synced
   everything behind the m-th call, for every n and m: file systems keep to that order, but not to that of contents. The same
   has to hold.

Of the writes to one file the first and the last count. Needs a C compiler (`cc`). Exits with 1 if anything went wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.countdown_cpu.make_model import make_model, make_tokenizer
from scripts.faults.case import Bench

SOURCE = Path(__file__).with_name("failing_disk.c")
ERRORS = {"ENOSPC": False, "EDQUOT": False, "EROFS": False, "EIO": True}  # and whether only one call fails
ROOT = "FAILING_DISK"
CARRIED = {"config.yaml": b"run: {name: run}\n", "hf/config.json": b"{}", "hf/tokenizer.json": b"{}" * 1000}


class Disk:
    """What lies between this process and the files below `root`; loaded before it was."""

    def __init__(self) -> None:
        self.root = Path(os.environ[ROOT])
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])

    def record(self, action: Callable[[], object], log: Path) -> list[list[str]]:
        """The calls of `action` that change the disk, each with its paths."""
        self._library.disk_begin(os.fsencode(log), -1, 0, 0)
        action()
        self._library.disk_end()
        return [line.split("\t") for line in log.read_text().splitlines()]

    def failing(self, action: Callable[[], object], first: int, error: str) -> Exception | None:
        """What `action` raises where calls fail from `first` on."""
        self._library.disk_begin(None, first, getattr(errno, error), ERRORS[error])
        try:
            action()
        except Exception as failure:
            return failure
        finally:
            self._library.disk_end()
        return None


# -- power ---------------------------------------------------------------------------------------------------------------

Tree = dict[str, Any]  # paths; what lies there is None for a folder, or whatever stands for a file


class Log:
    """The calls of a save, in their order, on a disk that held `before`: what a loss of power leaves of them."""

    def __init__(
        self, calls: Sequence[Sequence[str]], before: dict[str, bytes | None], after: dict[str, bytes | None]
    ) -> None:
        self.calls = calls
        self._before: Tree = dict(before)
        self.entries = [n for n, (call, *_) in enumerate(calls) if call not in ("write", "sync")]
        # a file is known by the call that made it; what is written into it is all there in the end
        self._written: dict[int, int] = {}  # by file: the last call that writes to it
        self._synced: dict[int, list[int]] = {}
        tree = dict(self._before)
        for number, call in enumerate(calls):
            file = tree.get(call[1])
            if call[0] == "write" and isinstance(file, int):
                self._written[file] = number
            elif call[0] == "sync" and isinstance(file, int):
                self._synced.setdefault(file, []).append(number)
            else:
                _apply(tree, number, *call)
        self._contents = {file: after[path] for path, file in tree.items() if isinstance(file, int)}

    def after_loss(self, n: int, m: int) -> dict[str, bytes | None]:
        """What the first `n` calls leave, where those to folders from `m` on are lost unless their folder was synced."""
        tree = dict(self._before)
        for number in self.entries:
            if number < n and (number < m or self._is_synced(number, n)):
                _apply(tree, number, *self.calls[number])
        return {path: self._content(file, n) if isinstance(file, int) else file for path, file in tree.items()}

    def _is_synced(self, number: int, n: int) -> bool:
        folders = {os.path.dirname(path) for path in self.calls[number][1:]}
        synced = {call[1] for call in self.calls[number:n] if call[0] == "sync"}
        return folders <= synced

    def _content(self, file: int, n: int) -> bytes | None:
        written = self._written.get(file, -1)
        is_there = written < n and any(written < sync < n for sync in self._synced.get(file, []))
        return self._contents[file] if is_there else b""


def _apply(tree: Tree, number: int, call: str, path: str, to: str = "") -> None:
    if call == "create" and os.path.dirname(path) in tree:
        tree[path] = number
    elif call == "mkdir" and os.path.dirname(path) in tree:
        tree[path] = None
    elif call in ("unlink", "rmdir"):
        for name in [name for name in tree if _is_within(name, path)]:
            del tree[name]
    elif call == "rename" and path in tree:
        for name in [name for name in tree if _is_within(name, to)]:
            del tree[name]
        for name in [name for name in tree if _is_within(name, path)]:
            tree[to + name.removeprefix(path)] = tree.pop(name)


def _is_within(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}/")


def read_tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in [folder, *folder.rglob("*")]}


def write_tree(tree: dict[str, bytes | None]) -> None:
    for path in sorted(tree):
        content = tree[path]
        Path(path).mkdir() if content is None else Path(path).write_bytes(content)


def _small_model(folder: Path) -> Path:
    make_model(0, layers=1, width=16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


# -- a save --------------------------------------------------------------------------------------------------------------


class Saves:
    """Saves into the folder `checkpoints` of the disk, by an engine of one rank."""

    def __init__(self, disk: Disk, model_root: Path) -> None:
        from megatron_reheat.model.checkpoint import install_checkpoint_fixes
        from megatron_reheat.model.engine import Engine
        from megatron_reheat.parallel import topology
        from megatron_reheat.recipe import load_config

        bench = Bench(model_root / "bench", _small_model(model_root / "model"), copies_model=False)
        config = load_config(bench.recipe())
        install_checkpoint_fixes()
        self._engine = Engine(config, bench.model, topology.initialize(config))
        self.disk, self.folder = disk, disk.root / "checkpoints"
        self.folder.mkdir()
        self.save(2)
        self.before = read_tree(self.folder)

    def save(self, step: int) -> None:
        from megatron_reheat.model.checkpoint_save import save_checkpoint

        save_checkpoint(self._engine, self.folder, step, {"step": step}, keep=1, is_best=True, carried=CARRIED)

    def restore(self, tree: dict[str, bytes | None] | None = None) -> None:
        shutil.rmtree(self.folder)
        write_tree(self.before if tree is None else tree)

    def problems(self) -> Iterator[str]:
        """Of what a run that goes on would find."""
        from megatron_reheat.model.checkpoint import latest_checkpoint, list_checkpoints, verify_checkpoint

        latest = latest_checkpoint(self.folder)
        for checkpoint in {*list_checkpoints(self.folder), *([latest] if latest else [])}:
            if problem := verify_checkpoint(checkpoint):
                yield problem
        if latest is None:
            yield "no checkpoint is left"

    def left(self) -> Iterator[Path]:
        return (path for path in self.folder.iterdir() if path.name.endswith(".partial"))

    def save_again(self) -> Iterator[str]:
        """On a disk that works again; it clears what is left."""
        try:
            self.save(6)
        except Exception as failed:
            yield f"the next save fails: {failed!r}"
        yield from self.problems()
        yield from (f"{path} is left after the next save" for path in self.left())


@dataclass
class Outcome:
    points: int = 0
    refused: int = 0
    one_sentence: int = 0
    whole: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)


def points_of(calls: Sequence[Sequence[str]]) -> list[int]:
    """Every call but the writes to a file between its first and its last."""
    writes: dict[str, list[int]] = {}
    for number, (call, path, *_) in enumerate(calls):
        if call == "write":
            writes.setdefault(path, []).append(number)
    middle = {number for numbers in writes.values() for number in numbers[1:-1]}
    return [number for number in range(len(calls)) if number not in middle]


def fail_everywhere(saves: Saves, points: Sequence[int], error: str) -> Outcome:
    from megatron_reheat.errors import ReheatError

    outcome = Outcome()
    for first in points:
        saves.restore()
        failure = saves.disk.failing(lambda: saves.save(4), first, error)
        problems = list(saves.problems())
        is_sentence = failure is None or (isinstance(failure, ReheatError) and "\n" not in str(failure))
        outcome.points += 1
        outcome.refused += failure is not None
        outcome.one_sentence += is_sentence
        outcome.whole += not problems
        if not is_sentence:
            problems.append(f"not one sentence: {failure!r}")
        if any(saves.left()):
            outcome.left += 1
            problems += saves.save_again()
        outcome.wrong += [f"{error} from call {first} on: {text}" for text in problems]
    return outcome


def lose_power_everywhere(saves: Saves, log: Log, points: Sequence[int]) -> Outcome:
    """`refused` counts the different states that are left."""
    outcome = Outcome()
    seen: set[frozenset[tuple[str, bytes | None]]] = set()
    for n in [*points, len(log.calls)]:
        for m in [number for number in log.entries if number < n] + [n]:
            tree = log.after_loss(n, m)
            outcome.points += 1
            if (key := frozenset(tree.items())) in seen:
                continue
            seen.add(key)
            outcome.refused += 1
            saves.restore(tree)
            problems = list(saves.problems())
            outcome.whole += not problems
            if any(saves.left()):
                outcome.left += 1
                problems += saves.save_again()
            outcome.wrong += [
                f"power lost after call {n}, those to folders from {m} on too: {text}" for text in problems
            ]
    return outcome


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only at every N-th call")
    parser.add_argument("--calls", action="store_true", help="print the calls of a save")
    parsed = parser.parse_args(arguments)
    if ROOT not in os.environ:
        return _run_on_a_disk()
    with tempfile.TemporaryDirectory() as folder:
        saves = Saves(Disk(), Path(folder))
        calls = saves.disk.record(lambda: saves.save(4), Path(folder) / "calls")
        log = Log(calls, saves.before, read_tree(saves.folder))
        for number, (call, *paths) in enumerate(calls if parsed.calls else ()):
            print(number, call, *(path.removeprefix(f"{saves.folder}/") for path in paths))
        counts = ", ".join(f"{count} {call}" for call, count in Counter(call for call, *_ in calls).most_common())
        points = points_of(calls)[:: parsed.every]
        print(f"a save makes {len(calls)} calls: {counts}")
        print(
            f"{'the disk':<14} {'points':>6} {'refused':>7} {'one sentence':>12} {'whole':>6} {'left and cleared':>16}"
        )
        wrong = []
        for error in ERRORS:
            own = fail_everywhere(saves, points, error)
            wrong += own.wrong
            print(f"{error:<14} {own.points:>6} {own.refused:>7} {own.one_sentence:>12} {own.whole:>6} {own.left:>16}")
        own = lose_power_everywhere(saves, log, points)
        wrong += own.wrong
        states = f"{own.whole} of {own.refused} different states whole, {own.left} with what is left"
        print(f"without power, {own.points} points: {states}")
    for text in wrong:
        print(f"WRONG {text}")
    return 1 if wrong else 0


def _run_on_a_disk() -> int:
    """This command again, with the library loaded."""
    with tempfile.TemporaryDirectory() as folder:
        library, root = Path(folder) / "failing_disk.so", Path(folder) / "disk"
        root.mkdir()
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
        command = [sys.executable, "-W", "ignore", "-m", "scripts.faults.crash_points", *sys.argv[1:]]
        return subprocess.run(command, env={**os.environ, "LD_PRELOAD": str(library), ROOT: str(root)}).returncode


if __name__ == "__main__":
    sys.exit(main())
