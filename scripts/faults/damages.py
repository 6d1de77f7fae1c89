"""What can be wrong with a run folder whose newest checkpoint is step-4 and which keeps the whole checkpoint step-2 as well."""

from __future__ import annotations

import functools
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_reheat.model.carried_files import MODEL_FOLDER
from megatron_reheat.model.checkpoint import digest
from tests.hostile_checkpoints import PAYLOADS, tamper

NEWEST, OTHER = "step-4", "step-2"
METADATA, STATE, MANIFEST = ".metadata", "state.json", "manifest.json"
EVERY = ("resume", "fork", "convert")
STARTS = ("resume", "fork")


@dataclass(frozen=True)
class Damage:
    """`make` damages a run folder; the canary is what code that must not run would make.

    A refusal names one of `words`, and the checkpoint `whole` to go on from. Where nothing is lost, `goes_on` is the step from
    which a run goes on all the same.
    """

    kind: str
    name: str
    make: Callable[[Path, Path], None]
    words: Sequence[str] = ()
    commands: Sequence[str] = EVERY
    whole: str = OTHER
    goes_on: int | None = None


def damages(checkpoint: Path) -> list[Damage]:
    """Those of a checkpoint with the files of this one."""
    return [
        *_files(checkpoint),
        *_folders(),
        *_pointers(),
        *_pickles(),
        *_contents(checkpoint),
        *_states(),
        *_manifests(),
        *_references(),
        *_run_files(),
    ]


# -- bytes and places ----------------------------------------------------------------------------------------------------


def _replaced(path: Path, by: bytes) -> None:
    _gone(path)
    path.write_bytes(by)


def _gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def _a_folder(path: Path) -> None:
    _gone(path)
    path.mkdir()


def _a_link(path: Path, to: str) -> None:
    _gone(path)
    path.symlink_to(to)


def _a_pipe(path: Path) -> None:
    _gone(path)
    os.mkfifo(path)


def _huge(path: Path) -> None:
    os.truncate(path, 1 << 40)  # without taking any room


# what can happen to a file, and whether nothing can be read as it after that
TO_A_FILE: dict[str, Callable[[Path], None]] = {
    "removed": _gone,
    "renamed": lambda path: _none(path.rename(path.with_name(f"{path.name}.bak"))),
    "emptied": lambda path: _replaced(path, b""),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "a byte too long": lambda path: _replaced(path, path.read_bytes() + b"\0"),
    "zeroed": lambda path: _replaced(path, bytes(path.stat().st_size)),
    "one bit flipped": _flipped,
    "somebody's text": lambda path: _replaced(path, b"# my notes\n"),
    "a folder": _a_folder,
    "a link to nothing": lambda path: _a_link(path, "nowhere"),
    "a link to itself": lambda path: _a_link(path, path.name),
    "a pipe": _a_pipe,
    "a device without end": lambda path: _a_link(path, "/dev/zero"),
    "that of another checkpoint": lambda path: _none(shutil.copy(path.parents[1] / OTHER / path.name, path)),
}


def _none(_: object) -> None:
    """For what returns something."""


def _files(checkpoint: Path) -> Iterator[Damage]:
    for name in sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()):
        for what, do in TO_A_FILE.items():
            same = (checkpoint.parent / OTHER / name).read_bytes() == (checkpoint / name).read_bytes()
            if what == "that of another checkpoint" and same:
                continue
            make = functools.partial(_in_newest, name, do)
            # its manifest is another checkpoint's, so that any file may be the first that differs
            words = (name,) if (what, name) != ("that of another checkpoint", MANIFEST) else (f"/{NEWEST}/",)
            yield Damage(f"file: {what}", name, make, words)
    for what in ("removed", "renamed", "emptied", "a link to nothing", "a pipe"):
        make = functools.partial(_in_newest, MODEL_FOLDER, TO_A_FILE[what])
        yield Damage(f"folder: {what}", MODEL_FOLDER, make, (f"/{MODEL_FOLDER}/",))
    shards = sorted(path.name for path in checkpoint.glob("*.distcp"))
    yield Damage("shards", "exchanged", functools.partial(_exchanged, shards[0], shards[-1]), shards)
    rank = [name for name in shards if name.startswith("__1_")]
    assert rank, "two ranks have to write it"
    yield Damage("shards", "one rank's are missing", functools.partial(_without, rank), rank)


def _in_newest(name: str, do: Callable[[Path], None], run: Path, canary: Path) -> None:
    do(run / "checkpoints" / NEWEST / name)


def _exchanged(one: str, other: str, run: Path, canary: Path) -> None:
    folder = run / "checkpoints" / NEWEST
    (
        (folder / one).rename(folder / "aside"),
        (folder / other).rename(folder / one),
        (folder / "aside").rename(folder / other),
    )


def _without(names: Sequence[str], run: Path, canary: Path) -> None:
    for name in names:
        (run / "checkpoints" / NEWEST / name).unlink()


def _folders() -> Iterator[Damage]:
    def at(place: str, do: Callable[[Path], None]) -> Callable[[Path, Path], None]:
        return lambda run, canary: do(run / "checkpoints" / place)

    def elsewhere(path: Path) -> None:
        path.rename(path.parents[1] / "moved")
        path.symlink_to(path.parents[1] / "moved")

    def partial(path: Path) -> None:
        path.rename(path.with_name(f".{path.name}.partial"))

    kind = "checkpoint folder"
    # what is not there any more cannot be gone on from, and the newest that is there is whole
    for name, do in {
        "removed": _gone,
        "renamed": lambda path: _none(path.rename(path.with_name(f"{path.name}-copy"))),
        "a file": lambda path: _replaced(path, b""),
        "a pipe": _a_pipe,
        "a link to nothing": lambda path: _a_link(path, "nowhere"),
        "a link to itself": lambda path: _a_link(path, path.name),
        "left half written": partial,
    }.items():
        yield Damage(kind, name, at(NEWEST, do), goes_on=2)
    yield Damage(kind, "empty", at(NEWEST, _a_folder), (MANIFEST, STATE))
    yield Damage(kind, "a link to where it is whole", at(NEWEST, elsewhere), goes_on=4)
    for name in ("notes.txt", ".DS_Store", "__9_9.distcp", "state.json~"):
        yield Damage(kind, f"{name} in it", at(f"{NEWEST}/{name}", lambda path: _none(path.write_text("x"))), goes_on=4)
    for name in ("step-9-copy", "step-09", "step-²"):
        yield Damage(kind, f"{name} beside it", at(name, lambda path: path.mkdir()), goes_on=4)

    def both(path: Path) -> None:
        for name in (NEWEST, OTHER):
            (path / name / STATE).unlink()

    yield Damage(kind, "and the other one", at("", both), (STATE,), whole="")


def _pointers() -> Iterator[Damage]:
    def holding(content: bytes) -> Callable[[Path, Path], None]:
        return lambda run, canary: _replaced(run / "checkpoints" / "latest", content)

    def becoming(do: Callable[[Path], None], pointer: str = "latest") -> Callable[[Path, Path], None]:
        return lambda run, canary: do(run / "checkpoints" / pointer)

    kind = "latest"
    for name, content, step in (
        ("empty", b"", 4),
        ("white space", b" \n", 4),
        ("with a line's end", b"step-2\r\n", 2),
        ("names nothing", b"step-9", 4),
    ):
        yield Damage(kind, name, holding(content), goes_on=step)
    for name, content in {
        "names a folder outside": b"../../../other",
        "names a checkpoint outside": b"../../other/checkpoints/step-2",
        "an absolute path": b"/tmp",
        "the checkpoints' folder": b".",
        "two names": b"step-4\nstep-2",
        "another spelling": b"step-04",
        "a NUL": b"step-4\0",
        "not a text": b"\xff\xfe\x00",
        "long": b"step-" + b"4" * 5000,
        "a file": b"best",
    }.items():
        yield Damage(kind, name, holding(content), ("latest",), whole=NEWEST)
    for name, do in {
        "removed": _gone,
        "a folder": _a_folder,
        "a link to nothing": lambda path: _a_link(path, "nowhere"),
        "a link to itself": lambda path: _a_link(path, path.name),
        "a pipe": _a_pipe,
    }.items():
        yield Damage(kind, name, becoming(do), goes_on=4)
    yield Damage(kind, "a device without end", becoming(lambda path: _a_link(path, "/dev/zero")), goes_on=4)
    yield Damage(kind, "a terabyte", becoming(_huge), ("latest",), whole=NEWEST)
    for name, do in TO_A_FILE.items():
        if name not in ("renamed", "that of another checkpoint"):
            yield Damage("best", name, becoming(do, "best"), goes_on=4)
    yield Damage(
        "best", "names a folder outside", lambda run, canary: _replaced(run / "checkpoints/best", b".."), goes_on=4
    )


# -- what digests do not tell --------------------------------------------------------------------------------------------


def _sealed(change: Callable[[Path], None]) -> Callable[[Path, Path], None]:
    """The change, with a manifest that fits."""

    def make(run: Path, canary: Path) -> None:
        checkpoint = run / "checkpoints" / NEWEST
        change(checkpoint)
        seal(checkpoint)

    return make


def seal(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    files = (path for path in checkpoint.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(checkpoint)): digest(path) for path in files}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def _pickles() -> Iterator[Damage]:
    words = {
        "inside common.pt": ("common.pt",),
        "inside the objects": (f"/{NEWEST} cannot be read",),
    }
    for name in PAYLOADS:
        # converting reads no objects, whose place among the tensors is theirs alone
        yield Damage(
            "code in a pickle", name,
            lambda run, canary, name=name: tamper(run / "checkpoints" / NEWEST, name, canary),
            words.get(name, (METADATA,)), STARTS if name == "inside the objects" else EVERY,
        )  # fmt: skip


def _contents(checkpoint: Path) -> Iterator[Damage]:
    """Files that are what the manifest says, and not what they should be."""
    kind = "contents"
    metadata = pickle.loads((checkpoint / METADATA).read_bytes())
    weight = next(
        name
        for name in sorted(metadata.state_dict_metadata)
        if name.endswith("linear_fc2.weight") and "optimizer" not in name
    )

    def listed(change: Callable[[Any], None]) -> Callable[[Path, Path], None]:
        def change_file(checkpoint: Path) -> None:
            path = checkpoint / METADATA
            listing = pickle.loads(path.read_bytes())
            change(listing)
            path.write_bytes(pickle.dumps(listing))

        return _sealed(change_file)

    def of_weight(**changes: Any) -> Callable[[Any], None]:
        def change(listing: Any) -> None:
            listing.state_dict_metadata[weight] = replace(listing.state_dict_metadata[weight], **changes)

        return change

    def placed(**changes: Any) -> Callable[[Any], None]:
        def change(listing: Any) -> None:
            for index, place in listing.storage_data.items():
                if index.fqn == weight:
                    listing.storage_data[index] = replace(place, **changes)

        return change

    def forgotten(listing: Any) -> None:
        del listing.state_dict_metadata[weight]

    def placeless(listing: Any) -> None:
        for index in [index for index in listing.storage_data if index.fqn == weight]:
            del listing.storage_data[index]

    size = metadata.state_dict_metadata[weight].size
    for name, change in {
        "a tensor is not listed": forgotten,
        "a tensor has no place": placeless,
        "a tensor in no chunks": of_weight(chunks=[]),
        "a tensor of another shape": of_weight(size=torch.Size([size[0] + 1, *size[1:]])),
        "a tensor without end": of_weight(size=torch.Size([1 << 50, *size[1:]])),
        "a place behind the end": placed(offset=1 << 40),
        "a place before the start": placed(offset=-5),
        "a place of no length": placed(length=0),
        "a place in another file": placed(relative_path=METADATA),
        "a place in no file": placed(relative_path="__7_7.distcp"),
        "a place in the parent": placed(relative_path="../latest"),
    }.items():
        words = (METADATA, f"/{NEWEST} ", f"/{NEWEST}:")
        # of what is not listed, or not as large, `convert` says that it is another model's
        is_other = "not listed" in name
        yield Damage(kind, name, listed(change), words, STARTS if is_other else EVERY)
        if is_other:
            yield Damage(kind, name, listed(change), words, ("convert",), whole="")
    for name, value in {"a list": [], "nothing": None, "a word": "metadata"}.items():
        yield Damage(
            kind, f"the list of tensors is {name}",
            _sealed(lambda path, value=value: _replaced(path / METADATA, pickle.dumps(value))), (METADATA,),
        )  # fmt: skip
    for name, value in {"empty": {}, "a list": [], "of another make": {"optimizer": 3}}.items():
        yield Damage(
            kind, f"common.pt is {name}", _sealed(lambda path, value=value: _saved(value, path / "common.pt")),
            ("common.pt", f"/{NEWEST} "), STARTS,
        )  # fmt: skip
    for shard in sorted(path.name for path in checkpoint.glob("*.distcp"))[:1]:
        for name, do in {
            "zeroed": TO_A_FILE["zeroed"], "cut in half": TO_A_FILE["cut in half"], "emptied": TO_A_FILE["emptied"],
        }.items():  # fmt: skip
            yield Damage(
                kind, f"a shard {name}", _sealed(lambda path, do=do, shard=shard: do(path / shard)),
                (shard, f"/{NEWEST} "), STARTS,
            )  # fmt: skip
    for name, text in {
        "no JSON": "{", "a list": "[]", "of another backend": '{"sharded_backend": "zarr"}', "empty": "{}",
        "of a version to come": '{"sharded_backend": "torch_dist", "sharded_backend_version": 99, "common_backend": "torch"}',
    }.items():  # fmt: skip
        yield Damage(
            kind, f"metadata.json is {name}",
            _sealed(lambda path, text=text: _replaced(path / "metadata.json", text.encode())),
            ("metadata.json", f"/{NEWEST} "), STARTS,
        )  # fmt: skip


def _saved(value: Any, path: Path) -> None:
    path.unlink()
    torch.save(value, path)


def _states() -> Iterator[Damage]:
    """With a manifest that fits, as another version would leave them."""
    kind, own = "state.json of another make", "adaptive_entropy"

    def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, Path], None]:
        def change_file(checkpoint: Path) -> None:
            state = json.loads((checkpoint / STATE).read_text())
            change(state)
            (checkpoint / STATE).write_text(json.dumps(state))

        return _sealed(change_file)

    for name, text in {
        "a list": "[]", "null": "null", "a number": "4", "no JSON": '{"step": 4', "empty": "", "{}": "{}",
        "nested": "[" * 100_000, "Python's": "{'step': 4}", "a number of 5,000 digits": '{"step": ' + "4" * 5000 + "}",
    }.items():  # fmt: skip
        yield Damage(
            kind, name, _sealed(lambda path, text=text: _replaced(path / STATE, text.encode())), (STATE,), STARTS
        )
    for name, values in {
        "step": ("4", -1, None, 4.5, [4]), "policy_version": ("4", None), "date": ("today", 5),
        "controller": (None, {"stage": "sft"}, {"stage": "reheat", "phase": 1}), "best": ({"a": "b"}, []),
        "method": (
            [], {"name": own}, {"name": own, "state": {}}, {"name": own, "state": 5}, {"name": own, "state": {"coef": "x"}},
        ),
        "momentum": (1,),
    }.items():  # fmt: skip
        for value in values:
            # a fork has the method's state of its own
            commands = ("resume",) if name == "method" and value else STARTS
            yield Damage(
                kind, f"{name}: {str(value)[:50]}",
                changed(lambda state, name=name, value=value: state.update({name: value})), (STATE,), commands,
            )  # fmt: skip
    for name, change in {
        "position -1": {"position": -1}, "position behind the end": {"position": 10**9}, "position 'x'": {"position": "x"},
        "epoch -1": {"epoch": -1}, "no position": {"position": None},
    }.items():  # fmt: skip
        yield Damage(
            "place in the data", name,
            changed(lambda state, change=change: state["cursor"].update(change)), (STATE,), STARTS,
        )  # fmt: skip
    for name, value in {"a list": [], "a word": "here", "of other data": {"fingerprint": "0"}}.items():
        yield Damage(
            "place in the data", name,
            changed(lambda state, value=value: state.update(
                cursor={**state["cursor"], **value} if isinstance(value, dict) else value
            )), (STATE, "place in the data"), STARTS, whole="" if name == "of other data" else OTHER,
        )  # fmt: skip


def _manifests() -> Iterator[Damage]:
    for name, text in {
        "a list": "[]", "null": "null", "{}": "{}", "nested": "[" * 100_000,
        "digests that are none": '{"state.json": 1, ".metadata": []}',
        "a file outside": None,
    }.items():  # fmt: skip

        def make(run: Path, canary: Path, text: str | None = text) -> None:
            path = run / "checkpoints" / NEWEST / MANIFEST
            outside = {"../../../model/config.json": "0", "/dev/zero": "0", **json.loads(path.read_text())}
            path.write_text(json.dumps(outside) if text is None else text)

        yield Damage(MANIFEST, name, make, (MANIFEST,))


# -- beside the checkpoints ----------------------------------------------------------------------------------------------


def _references() -> Iterator[Damage]:
    kind = "reference"
    for file in ("model.safetensors", "config.json"):
        for name in ("removed", "emptied", "cut in half", "a pipe", "a link to itself", "one bit flipped", "a folder"):
            if file == "config.json" and name != "removed":
                continue  # only its weights are read
            goes_on = 4 if file == "config.json" else None
            yield Damage(
                kind, f"{file} {name}",
                lambda run, canary, do=TO_A_FILE[name], file=file: do(run / "reference" / file),
                (f"reference/{file}", "reference"), ("resume",), whole="", goes_on=goes_on,
            )  # fmt: skip
    yield Damage(kind, "removed", lambda run, canary: _gone(run / "reference"), ("reference",), ("resume",), whole="")


def _run_files() -> Iterator[Damage]:
    # a run has its recipe, so that what it wrote down of it is only kept beside the new one; a checkpoint carries its own copy
    for name, do in TO_A_FILE.items():
        if name in ("renamed", "that of another checkpoint", "a byte too long", "cut in half", "one bit flipped"):
            continue
        lost = name in ("removed", "emptied", "zeroed", "somebody's text")
        yield Damage(
            "config.yaml", name, lambda run, canary, do=do: do(run / "config.yaml"), ("config.yaml",), ("convert",),
            whole="", goes_on=4,
        )  # fmt: skip
        yield Damage(
            "config.yaml", name, lambda run, canary, do=do: do(run / "config.yaml"), ("config.yaml",), ("resume",),
            whole="", goes_on=4 if lost else None,
        )  # fmt: skip
    for name, text in {
        "not a text": b"\xff\xfe\x00x", "a list": b"- a\n", "code": b"!!python/object/apply:os.mkdir [executed]\n",
        "nested": b"[" * 50_000, "no YAML": b"a: [",
        "model is a list": b"model: []\n", "hf_path is a number": b"model: {hf_path: 3}\n",
    }.items():  # fmt: skip
        yield Damage(
            "config.yaml", name, lambda run, canary, text=text: _replaced(run / "config.yaml", text), ("config.yaml",),
            ("convert",), whole="", goes_on=4,
        )  # fmt: skip
    for name, do in TO_A_FILE.items():
        if name in ("a folder", "a link to itself", "a pipe", "a device without end"):
            yield Damage(
                "metrics.jsonl", name, lambda run, canary, do=do: do(run / "metrics.jsonl"), ("metrics.jsonl",),
                ("resume", "report"), whole="",
            )  # fmt: skip
        elif name in ("removed", "emptied", "cut in half", "zeroed", "somebody's text"):
            yield Damage(
                "metrics.jsonl",
                name,
                lambda run, canary, do=do: do(run / "metrics.jsonl"),
                commands=("resume",),
                goes_on=4,
            )
    for name, do in TO_A_FILE.items():
        if name in ("a folder", "a pipe", "a link to itself", "a device without end"):
            yield Damage(
                "run.lock", name,
                lambda run, canary, do=do: ((run / "run.lock").touch(), do(run / "run.lock"))[1],
                ("run.lock",), ("resume",), whole="",
            )  # fmt: skip
    yield Damage(
        "run.lock",
        "somebody's text",
        lambda run, canary: _none((run / "run.lock").write_text("?")),
        commands=("resume",),
        goes_on=4,
    )
