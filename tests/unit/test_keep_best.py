"""Which folders are checkpoints, what rotation and going back to an older one leave, and what counts as the best."""

from __future__ import annotations

import errno
import json
import os
import queue
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_reheat.checkpoint_folder import remove_old_checkpoints, set_newer_aside
from megatron_reheat.errors import NonFiniteLossError, ReheatError
from megatron_reheat.model.checkpoint import (
    best_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    read_state,
)
from megatron_reheat.model.checkpoint_save import Contents, Saved, _Save
from megatron_reheat.recipe import parse_config
from megatron_reheat.run_folder import RunFolder
from megatron_reheat.stages.controller import Controller, Verdict
from megatron_reheat.stages.outcome import StepOutcome
from megatron_reheat.stages.run import Run
from megatron_reheat.stages.run_state import RunState, read_run_state
from megatron_reheat.stages.setbacks import proven_checkpoint
from megatron_reheat.types import At


def folder_with(folder: Path, steps: list[int], **pointers: str) -> Path:
    for step in steps:
        (folder / f"step-{step}").mkdir(parents=True)
        (folder / f"step-{step}" / "state.json").write_text("{}")
    for pointer, name in pointers.items():
        (folder / pointer).write_text(name)
    return folder


@pytest.mark.parametrize(
    ("best", "keep", "left"),
    [
        (None, 2, [100, 120]),
        ("step-20", 2, [20, 100, 120]),
        ("step-100", 2, [100, 120]),
        ("step-120", 1, [120]),
        ("step-7", 1, [120]),  # names nothing that is there
        ("step-20", 9, [20, 40, 100, 120]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(best: str | None, keep: int, left: list[int], tmp_path: Path) -> None:
    pointers = {"latest": "step-120"} | ({"best": best} if best else {})
    folder = folder_with(tmp_path, [20, 40, 100, 120], **pointers)
    remove_old_checkpoints(folder, keep)
    assert [path.name for path in list_checkpoints(folder)] == [f"step-{step}" for step in left]
    assert latest_checkpoint(folder) == folder / "step-120"
    assert best_checkpoint(folder) == (folder / best if best and int(best[5:]) in left else None)


def test_a_folder_without_a_best() -> None:
    assert best_checkpoint(Path("nowhere")) is None


def test_an_empty_pointer_names_no_checkpoint(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, [20], latest="", best="")
    assert (latest_checkpoint(folder), best_checkpoint(folder)) == (folder / "step-20", None)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_rotation_never_removes_what_latest_names(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, [1, 3, 6, 9], latest="step-3")
    remove_old_checkpoints(folder, 1)
    assert names(folder) == {"latest", "step-3", "step-9"}


@pytest.mark.parametrize("other", ["step-3-backup", "step-03", "step-", "step-٣", "step-3.old", "step-+3", "step-1_0"])
def test_only_a_step_with_its_number_is_a_checkpoint(other: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, [0, 3, 20], latest="step-20")
    (folder / other).mkdir()
    (folder / "step-7").write_text("a file")
    assert [path.name for path in list_checkpoints(folder)] == ["step-0", "step-3", "step-20"]
    remove_old_checkpoints(folder, 1)
    assert names(folder) == {"latest", "step-7", "step-20", other}
    assert RunFolder(folder.parent).saved_step is None
    (folder / "latest").write_text(other)
    with pytest.raises(ReheatError, match="which is not a checkpoint") as refused:
        latest_checkpoint(folder)
    assert f"{folder / 'latest'} names {other!r}" in str(refused.value)


@pytest.mark.parametrize("text", ["20", "../step-20", "checkpoints/step-20", "\xff\xfe", "step-20 step-3"])
def test_a_pointer_to_something_else_is_refused_not_passed_over(text: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "checkpoints", [3, 20])
    (tmp_path / "step-20").mkdir()
    (folder / "latest").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        ReheatError, match=r"write the name of one into the file, or remove the file for the newest \(.*step-20\)$"
    ):
        latest_checkpoint(folder)


def test_going_on_from_an_older_checkpoint_sets_the_newer_ones_aside(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "checkpoints", [1, 3, 6, 9], latest="step-3\n", best="step-6")
    (folder / "step-9.set-aside-1").mkdir()
    (folder / "step-4-backup").mkdir()
    assert RunFolder(tmp_path).saved_step == 3
    source = latest_checkpoint(folder)
    assert source == folder / "step-3"
    assert [path.name for path in set_newer_aside(source)] == ["step-6.set-aside-1", "step-9.set-aside-2"]
    assert [path.name for path in list_checkpoints(folder)] == ["step-1", "step-3"]
    best = folder / "step-6.set-aside-1"  # still the one with the best evaluation, until a better one is saved
    assert best_checkpoint(folder) == best and (best / "state.json").exists()
    assert (folder / "step-9.set-aside-2" / "state.json").exists() and (folder / "step-4-backup").is_dir()
    assert set_newer_aside(source) == []


@pytest.mark.parametrize(
    ("is_main", "forked", "event"),
    [
        (True, False, ["going on from step 3; later checkpoints are set aside as step-9.set-aside-1"]),
        (False, False, []),
        (True, True, []),  # the other run's checkpoints are its own
    ],
)
def test_a_run_says_what_it_sets_aside(is_main: bool, forked: bool, event: list[str], tmp_path: Path) -> None:
    source, said = folder_with(tmp_path, [3, 9], latest="step-3") / "step-3", []
    run: Any = SimpleNamespace(
        inputs=SimpleNamespace(source=source, forked=forked),
        topology=SimpleNamespace(is_main=is_main),
        state=RunState(step=3),
        logger=SimpleNamespace(log_event=said.append),
    )
    Run._set_newer_aside(run)
    assert said == event and (tmp_path / "step-9").exists() != bool(event)


def test_a_link_to_a_checkpoint_elsewhere_is_removed_and_its_target_stays(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "checkpoints", [3], latest="step-3")
    elsewhere = folder_with(tmp_path / "elsewhere", [1])
    (folder / "step-1").symlink_to(elsewhere / "step-1")
    remove_old_checkpoints(folder, 1)
    assert names(folder) == {"latest", "step-3"} and (elsewhere / "step-1" / "state.json").exists()


def test_only_a_better_evaluation_is_the_best() -> None:
    run: Any = SimpleNamespace(
        config=SimpleNamespace(checkpoint=SimpleNamespace(keep_best="eval/avg_at_k")), state=RunState()
    )
    seen = [{"reward/mean": 9.0}, {"eval/avg_at_k": 0.0}, {"eval/avg_at_k": 0.0}, {"eval/avg_at_k": 0.5}]
    seen += [{"eval/avg_at_k": 0.25, "eval/pass_at_k": 1.0}, {"eval/avg_at_k": 0.75}]
    assert [Run._is_best(run, metrics) for metrics in seen] == [False, True, False, True, False, True]
    assert run.state.best == {"eval/avg_at_k": 0.75}
    run.config.checkpoint.keep_best = None
    assert not Run._is_best(run, {"eval/avg_at_k": 1.0})


class ScriptedRun(Run):
    """A run whose steps only are finite or not, as `script` says; saving writes the state and rotates as ever."""

    def __init__(
        self,
        folder: Path,
        script: str,
        *,
        keep: int = 2,
        limit: int = 3,
        rollbacks: int = 0,
        fork: Path | None = None,
    ) -> None:
        self.config = parse_config(
            {
                "model": {"hf_path": "none"},
                "data": {"path": "none"},
                "run": {"steps": len(script)},
                "optimizer": {"max_skipped_steps": limit, "max_rollbacks": rollbacks},
                "checkpoint": {"every": 2, "keep": keep},
            }
        )
        self.folder, self.state, self.said = RunFolder(folder), RunState(), []
        self.logged: list[dict[str, float]] = []
        self.frozen: dict[str, Any] = {}
        self._saved_step, self._save_is_due, self._save_times = -1, False, {}
        self._saver: Any = ScriptedSaver(self.folder.checkpoints)
        self.inputs: Any = SimpleNamespace(
            source=fork, forked=fork is not None, today=date(2026, 1, 1), held_out={}, decode=str
        )
        parts: Any = SimpleNamespace(
            version=0,
            cursor_state=dict,
            kept_fraction=None,
            surplus=SimpleNamespace(state=list),
            state=dict,
            log_event=lambda text, style="": self.said.append(text),
            log_step=lambda record: self.logged.append(dict(record.metrics)),
            write_rollouts=lambda *_: None,
            sync=lambda: None,
            engine_restarts=0,
            snapshots={},
            forget=lambda: None,
            publish=lambda version: setattr(parts, "version", version),
            is_main=True,
            barrier=lambda: None,
            share_from_all=lambda mine: [mine],
            world_size=1,
            any=bool,
        )
        self.engine = self.policy = self.collector = self.sft_cursor = self.reheat = self.logger = parts
        self.topology = self.method = parts
        self.reference, self._method_name, self._carried = None, "grpo", None
        self.controller = Controller(self.config.controller)
        self.stages = {"rlvr": SimpleNamespace(step=self._scripted)}
        self.loaded: list[str] = []
        self._script = script

    def _scripted(self, at: At) -> tuple[StepOutcome, Verdict]:
        finite = self._script[at.step - 1] == "+"
        return StepOutcome({"a/b": 1.0}, (), None, applied=finite, finite=finite), Verdict.CONTINUE

    def _load(self, checkpoint: Path) -> RunState:
        self.loaded.append(checkpoint.name)
        return read_run_state(checkpoint)


class ScriptedSaver:
    """Writes the state and rotates as ever; a checkpoint is complete at the second time that is asked for it, or later."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.contents, self.borders, self.takes = folder, None, 0, 2
        self.in_background = True

    @property
    def step(self) -> int | None:
        return None if self.contents is None else self.contents.step

    def begin(self, contents: Contents, snapshots: dict) -> None:
        assert self.contents is None
        self.contents, self.borders = contents, 0

    def finish(self, *, wait: bool) -> Saved | None:
        self.borders += 1
        if self.contents is None or (not wait and self.borders < self.takes):
            return None
        contents, self.contents = self.contents, None
        path = self.folder / f"step-{contents.step}"
        path.mkdir(parents=True)
        (path / "state.json").write_text(json.dumps(contents.state))
        (self.folder / "latest").write_text(path.name)
        remove_old_checkpoints(self.folder, contents.keep)
        return Saved(path, 2.5)


def saved_steps(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder / "checkpoints")]


@pytest.mark.parametrize(
    ("script", "saved"),
    [
        ("++++++", ["step-4", "step-6"]),
        ("++++----", ["step-2", "step-4"]),  # nothing saved, nothing pruned
        ("++++-+", ["step-4", "step-6"]),
        ("+++-+", ["step-2", "step-5"]),  # what was due at 4 is saved after the next finite step
        ("---", []),
    ],
)
def test_nothing_is_saved_or_pruned_while_steps_are_skipped(script: str, saved: list[str], tmp_path: Path) -> None:
    run = ScriptedRun(tmp_path, script, limit=9)
    for _ in script:
        run._step()
    run._save(wait=True)
    assert saved_steps(tmp_path) == saved
    assert not any(read_state(path)["skipped_in_row"] for path in list_checkpoints(tmp_path / "checkpoints"))
    if script.endswith("-"):
        run._stop()
        (*_, text) = run.said
        skipped, source = len(script) - len(script.rstrip("-")), saved[-1].replace("-", " ") if saved else "the start"
        assert text == (
            f"asked to stop after steps that are not saved ({skipped} without a finite loss); "
            f"the same command goes on from {source}"
        )


@pytest.mark.parametrize(
    ("script", "loaded", "saved"),
    [
        ("+++----+++", ["step-2"], ["step-8", "step-10"]),
        ("++++----++++", ["step-2"], ["step-10", "step-12"]),  # no step from step-4 was finite
        # what was due meanwhile is saved at once: weights that gave one finite step more
        ("+++----+----++", ["step-2", "step-7"], ["step-12", "step-14"]),
        ("++++++----+----++", ["step-4", "step-10"], ["step-15", "step-16"]),
    ],
)
@pytest.mark.parametrize("takes", [1, 99], ids=lambda takes: f"saved after {takes}")
def test_a_run_goes_back_to_what_gave_finite_steps_and_on_with_other_prompts(
    takes: int, script: str, loaded: list[str], saved: list[str], tmp_path: Path
) -> None:
    run = ScriptedRun(tmp_path, script, rollbacks=2)
    run._saver.takes = takes
    for _ in script:
        run._step()
    run._finish_save(wait=True)
    assert run.loaded == loaded
    assert run.state.rollbacks == len(loaded) == run.policy.version  # new weights, a new version
    assert run.state.step == len(script) and run.state.skipped_in_row == 0
    assert saved_steps(tmp_path) == saved
    told = [text for text in run.said if "back to the weights" in text]
    assert len(told) == len(loaded) and all(f"(rollback {i} of 2)" in text for i, text in enumerate(told, 1))


def test_a_checkpoint_is_complete_between_two_steps_and_the_next_one_waits_for_it(tmp_path: Path) -> None:
    run = ScriptedRun(tmp_path, "+++++")
    saved = []
    for _ in range(5):
        run._step()
        saved.append(saved_steps(tmp_path))
    assert saved == [[], [], [], ["step-2"], ["step-2"]]  # at the border behind step 3, and there are two in step 4
    written = [line.get("time/save_write_s") for line in run.logged]
    assert written == [None, None, None, 2.5, None] and run._save_times == {}
    assert [line.get("time/save_s", 0.0) > 0 for line in run.logged] == [False, False, True, True, True]
    run._saver.takes = 9
    run._save(wait=True)
    assert saved_steps(tmp_path) == ["step-4", "step-5"]
    assert [text for text in run.said if "waits" in text] == ["step 5 waits to be saved until step 4 is"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_is_not_asynchronous_is_complete_at_once(asynchronous: bool, tmp_path: Path) -> None:
    run = ScriptedRun(tmp_path, "++")
    run._saver.in_background = asynchronous
    run._step()
    run._step()
    assert saved_steps(tmp_path) == ([] if asynchronous else ["step-2"])


@pytest.mark.parametrize(("ranks", "everywhere", "saved"), [(1, False, True), (2, True, True), (2, False, False)])
def test_a_run_that_fails_completes_what_is_begun_where_all_ranks_know_of_it(
    ranks: int, everywhere: bool, saved: bool, tmp_path: Path
) -> None:
    run, failure = ScriptedRun(tmp_path, "++++"), ReheatError("lost")
    failure.on_every_rank = everywhere
    run.topology.world_size = ranks

    def fail(at: At) -> Any:
        raise failure

    run._step()
    run._step()
    run.stages["rlvr"].step = fail
    with pytest.raises(ReheatError, match=r"^lost$"):
        run._go_on_or_complete(4)
    assert saved_steps(tmp_path) == (["step-2"] if saved else [])


def test_a_run_that_went_back_too_often_ends_and_names_what_is_good(tmp_path: Path) -> None:
    run = ScriptedRun(tmp_path, "++++----+----+----", rollbacks=2)
    message = until_it_ends(run)
    assert run.loaded == ["step-2", "step-8"] and run.state.step == 17
    folder = tmp_path / "checkpoints"
    assert f"; the latest good checkpoint is {folder / 'step-14'}, from which no step was finite; one of" in message
    assert f"one of before is {folder / 'step-13'} (to go on" in message


def test_rl_does_not_go_back_into_the_warm_start(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (2, 4, 6):
        (folder / f"step-{step}").mkdir(parents=True)
        (folder / f"step-{step}" / "state.json").write_text("{}")
    assert proven_checkpoint(folder, 6) == folder / "step-4"
    assert proven_checkpoint(folder, 6, since=4) == folder / "step-4"
    assert proven_checkpoint(folder, 6, since=5) is None


def test_without_a_checkpoint_that_gave_a_finite_step_there_is_no_going_back(tmp_path: Path) -> None:
    run = ScriptedRun(tmp_path, "++----", rollbacks=2)
    assert "the latest good checkpoint is" in until_it_ends(run) and run.loaded == []


def until_it_ends(run: ScriptedRun) -> str:
    with pytest.raises(NonFiniteLossError) as failure:
        for _ in run._script:
            run._step()
    return str(failure.value)


def test_the_error_names_a_checkpoint_of_a_finite_step(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    message = until_it_ends(ScriptedRun(tmp_path, "+++----", keep=1))
    assert message.startswith("loss or gradient was not finite for 4 steps in a row (optimizer.max_skipped_steps 3); ")
    assert f"; the latest good checkpoint is {folder / 'step-2'}; lower optimizer.lr" in message
    assert saved_steps(tmp_path) == ["step-2"]


def test_the_error_tells_when_no_step_from_the_newest_checkpoint_was_finite(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    message = until_it_ends(ScriptedRun(tmp_path, "++++----"))
    assert (
        f"; the latest good checkpoint is {folder / 'step-4'}, from which no step was finite; one of before is "
        f"{folder / 'step-2'} (to go on from there, write step-2 into {folder / 'latest'}); lower optimizer.lr"
        in message
    )


def test_the_error_passes_over_what_an_earlier_version_saved_in_between(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "checkpoints", [6, 8, 10], latest="step-10")
    for step, skipped in ((8, 1), (10, 3)):
        (folder / f"step-{step}" / "state.json").write_text(json.dumps({"skipped_in_row": skipped}))
    (folder / "step-7").mkdir()  # damaged
    run = ScriptedRun(tmp_path, "-" * 12)
    run.state, run._saved_step = RunState(step=10, skipped_in_row=3), 10
    message = until_it_ends(run)
    assert f"the latest good checkpoint is {folder / 'step-6'} (to go on from there, write step-6 into" in message
    assert saved_steps(tmp_path) == ["step-6", "step-7", "step-8", "step-10"]


def test_the_error_of_a_fork_without_a_checkpoint_names_where_it_came_from(tmp_path: Path) -> None:
    trunk = tmp_path / "trunk" / "checkpoints" / "step-4"
    assert f"the latest good checkpoint is {trunk};" in until_it_ends(ScriptedRun(tmp_path, "----", fork=trunk))
    assert "the latest good checkpoint is none yet;" in until_it_ends(ScriptedRun(tmp_path, "----"))


# -- a full disk -------------------------------------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refuse(*_: Any, **__: Any) -> None:
    raise FULL


def in_torch(*_: Any, **__: Any) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nframe #0")


def plan_one_file(_: Any, folder: str, **__: Any) -> Any:
    """What Megatron gives back where a rank has one empty file to write."""
    bucket = (f"{folder}/part.distcp", "part.distcp", ([], []))
    return SimpleNamespace(async_fn=partial(print, []), async_fn_args=[0, [bucket], queue.Queue()], finalize_fns=[])


def share_alone(mine: Any, error: str | None) -> list[Any]:
    if error is not None:
        raise ReheatError(error)
    return [mine]


def save_alone(folder: Path) -> None:
    """Step 3, by one rank, of nothing but the file of `plan_one_file`."""
    topology: Any = SimpleNamespace(is_main=True, barrier=lambda: None, share_from_all=share_alone)
    copied: Any = SimpleNamespace(gather=lambda group: None, forget=lambda: None)
    save = _Save(topology, folder, Contents(3, {"step": 3}, keep=1), copied, {})
    save.finish(save.write(None))


@pytest.mark.parametrize(
    ("place", "refusal", "reason"),
    [
        ("megatron_reheat.model.checkpoint_save.dist_checkpointing.save", refuse, "No space left on device"),
        (
            "megatron_reheat.model.checkpoint_save.dist_checkpointing.save",
            in_torch,
            "a file could not be written in full",
        ),
        ("os.fsync", refuse, "No space left on device"),  # in the writer of a file
        ("os.fsync", in_torch, "a file could not be written in full"),
        ("megatron_reheat.model.checkpoint_save.digest", refuse, "No space left on device"),
        ("megatron_reheat.model.checkpoint_save.fsync", refuse, "No space left on device"),
        ("pathlib.Path.write_text", refuse, "No space left on device"),
        ("pathlib.Path.mkdir", refuse, "No space left on device"),
        ("pathlib.Path.rename", refuse, "No space left on device"),
    ],
)
def test_a_full_disk_is_one_sentence_and_leaves_the_old_checkpoint(
    place: str, refusal: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_with(tmp_path / "checkpoints", [1, 2], latest="step-2", best="step-1")
    monkeypatch.setattr("megatron_reheat.model.checkpoint_save.dist_checkpointing.save", plan_one_file)
    with monkeypatch.context() as full, pytest.raises(ReheatError) as failure:
        full.setattr(place, refusal)
        save_alone(folder)
    message = str(failure.value)
    assert message.startswith(f"cannot write {folder}") and reason in message and "\n" not in message
    assert message.endswith("what was saved before is whole, and the same command goes on from it")
    assert names(folder) == {"latest", "best", "step-1", "step-2"} and latest_checkpoint(folder) == folder / "step-2"
    save_alone(folder)  # there is room again
    assert names(folder) == {"latest", "best", "step-1", "step-3"} and latest_checkpoint(folder) == folder / "step-3"


def test_what_torch_says_of_a_small_file_on_a_full_disk_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr("megatron_reheat.model.checkpoint_save.dist_checkpointing.save", fail)
    with pytest.raises(ReheatError, match=r"a file could not be written in full, the disk may be full"):
        save_alone(tmp_path)


def test_another_fault_of_a_save_is_not_called_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("megatron_reheat.model.checkpoint_save.dist_checkpointing.save", fail)
    with pytest.raises(RuntimeError, match=r"^Connection closed by peer$"):
        save_alone(tmp_path)
