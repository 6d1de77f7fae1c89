from __future__ import annotations

import errno
import io
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_reheat.config import Config
from megatron_reheat.console import HEADER_EVERY
from megatron_reheat.errors import ReheatError
from megatron_reheat.recipe import load_config, parse_config
from megatron_reheat.run_folder import RunFolder, read_metrics, read_segments
from megatron_reheat.run_logger import RunLogger, StepRecord
from megatron_reheat.types import Completion, Group, Prompt, Reward

METRICS = {"reward/mean": 0.5, "reward/accuracy": 0.25, "entropy/mean": 0.0789, "time/step_s": 12.0}


def make_config(**sections: dict[str, Any]) -> Config:
    logging = {"tensorboard": False, "console": False} | sections.pop("logging", {})
    required = {"model": {"hf_path": "models/tiny"}, "data": {"path": "prompts.jsonl"}}
    return parse_config(required | {"logging": logging} | sections)


def record(step: int, **kwargs: Any) -> StepRecord:
    return StepRecord(**({"stage": "rlvr", "round": 0, "policy_version": step, "metrics": METRICS} | kwargs), step=step)


def log_steps(folder: Path, steps: range, start_step: int = 0, **sections: dict[str, Any]) -> RunFolder:
    run = RunFolder(folder)
    with RunLogger(make_config(**sections), run, is_main=True, start_step=start_step) as logger:
        for step in steps:
            logger.log_step(record(step))
    return run


def steps_of(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder)]


def test_one_line_per_step_with_identity_first(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with RunLogger(make_config(), run, is_main=True, start_step=0) as logger:
        logger.log_step(record(1))
        logger.log_step(record(2, stage="reheat", round=1, policy_version=9, event="reheated"))
        assert len(run.metrics.read_text().splitlines()) == 2  # flushed before close
        logger.log_event("entropy 0.078 < 0.08 nats: entering reheat round 1")
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert abs(lines[0].pop("time/unix_s") - time.time()) < 60
    assert lines[0] == {"step": 1, "stage": "rlvr", "round": 0, "policy_version": 1, **METRICS}
    assert list(lines[0])[:4] == ["step", "stage", "round", "policy_version"]
    assert lines[1]["stage"] == "reheat" and lines[1]["policy_version"] == 9 and lines[1]["event"] == "reheated"
    assert lines[2] == {"step": 2, "event": "entropy 0.078 < 0.08 nats: entering reheat round 1"}


def test_non_finite_values_become_null_and_are_counted(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    out = io.StringIO()
    config = make_config(logging={"console": True})
    broken = {"entropy/mean": math.nan, "optimizer/grad_norm": math.inf, "reward/mean": 1.0}
    with RunLogger(config, run, is_main=True, start_step=0, console=Console(file=out)) as logger:
        logger.log_step(record(1, metrics=broken))
    (line,) = read_metrics(tmp_path)
    assert line["entropy/mean"] is None and line["optimizer/grad_norm"] is None
    assert line["reward/mean"] == 1.0 and line["log/nonfinite"] == 2
    assert "NaN" not in run.metrics.read_text()
    assert "not finite at step 1: entropy/mean, optimizer/grad_norm" in out.getvalue()


def test_metric_names_cannot_hide_the_step(tmp_path: Path) -> None:
    with (
        RunLogger(make_config(), RunFolder(tmp_path), is_main=True, start_step=0) as logger,
        pytest.raises(ValueError, match="'step' needs a group"),
    ):
        logger.log_step(record(1, metrics={"step": 5.0}))


def test_resume_moves_later_and_half_written_lines_aside(tmp_path: Path) -> None:
    run = log_steps(tmp_path, range(1, 6))
    with run.metrics.open("a") as file:
        file.write('{"step": 6, "entro')  # killed in the middle of a write
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]  # a reader of the dead run is not disturbed
    log_steps(tmp_path, range(4, 6), start_step=3)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if "stage" in line] == [1, 2, 3, 4, 5]
    assert [line["event"] for line in lines if "event" in line] == ["resumed after step 3; 3 later lines set aside"]
    discarded = run.discarded_metrics.read_text().splitlines()
    assert [json.loads(line)["step"] for line in discarded[:2]] == [4, 5]
    assert discarded[2] == '{"step": 6, "entro'
    log_steps(tmp_path, range(1, 2), start_step=0)
    assert len(run.discarded_metrics.read_text().splitlines()) == 3 + 6  # appended, never replaced


def test_a_line_broken_in_the_middle_is_named(tmp_path: Path) -> None:
    run = log_steps(tmp_path, range(1, 4))
    lines = run.metrics.read_text().splitlines()
    run.metrics.write_text("\n".join([lines[0], lines[1][:20], lines[2]]) + "\n")
    with pytest.raises(ReheatError, match=r"metrics\.jsonl:2 is not a metrics line"):
        read_metrics(tmp_path)


def test_missing_metrics_name_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ReheatError, match=f"{tmp_path} holds no metrics.jsonl"):
        read_metrics(tmp_path)


def test_fork_chains_the_trunk_up_to_the_fork(tmp_path: Path) -> None:
    log_steps(tmp_path / "trunk", range(1, 8))
    trunk = str(tmp_path / "trunk")
    log_steps(tmp_path / "arm", range(5, 7), start_step=4, run={"fork_from": trunk})
    lines = read_metrics(tmp_path / "arm")
    assert [line["step"] for line in lines if "stage" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["fork_step"] for line in lines if "fork_step" in line] == [4]
    log_steps(tmp_path / "twig", range(6, 8), start_step=5, run={"fork_from": str(tmp_path / "arm")})
    segments = read_segments(tmp_path / "twig")
    assert [s.folder.name for s in segments] == ["trunk", "arm", "twig"]
    assert [[r["step"] for r in s.records if "stage" in r] for s in segments] == [[1, 2, 3, 4], [5], [6, 7]]


def test_fork_is_found_next_to_a_run_that_was_moved_and_noted_once(tmp_path: Path) -> None:
    log_steps(tmp_path / "trunk", range(1, 4))
    fork = {"fork_from": "elsewhere/trunk"}
    log_steps(tmp_path / "arm", range(4, 6), start_step=3, run=fork)
    log_steps(tmp_path / "arm", range(6, 7), start_step=5, run=fork)
    assert [line["step"] for line in read_metrics(tmp_path / "arm")] == [1, 2, 3, 3, 4, 5, 6]
    (tmp_path / "trunk").rename(tmp_path / "gone")
    with pytest.warns(UserWarning, match="elsewhere/trunk has no metrics here"):
        assert steps_of(tmp_path / "arm") == [3, 4, 5, 6]


def test_config_is_loadable_and_an_older_one_is_kept(tmp_path: Path) -> None:
    run = log_steps(tmp_path, range(1, 2), run={"steps": 10})
    log_steps(tmp_path, range(2, 2), start_step=1, run={"steps": 10})
    assert not list(tmp_path.glob("config.previous-*"))
    log_steps(tmp_path, range(2, 2), start_step=1, run={"steps": 20})
    assert load_config(run.config).run.steps == 20
    assert yaml.safe_load((tmp_path / "config.previous-1.yaml").read_text())["run"]["steps"] == 10
    assert all(path.is_dir() for path in (run.checkpoints, run.report, run.logs))


def test_an_unwritable_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReheatError, match=r"cannot write run folder .*change run\.folder"):
        RunFolder(tmp_path / "file" / "run").create(make_config())


def test_other_ranks_leave_no_trace(tmp_path: Path) -> None:
    with RunLogger(make_config(), RunFolder(tmp_path / "run"), is_main=False, start_step=0) as logger:
        logger.log_step(record(1))
        logger.log_event("nothing")
        logger.write_rollouts(1, [make_group(graded=True)], str, limit=1)
    assert list(tmp_path.iterdir()) == []


def make_group(*, graded: bool) -> Group:
    completions = tuple(
        Completion(np.array(ids, np.int32), np.zeros(len(ids), np.float32), 1.0, 7, reason)  # type: ignore[arg-type]
        for ids, reason in (([65, 66], "stop"), ([67], "length"))
    )
    rewards = (Reward(1.0, True), Reward(-0.5, False, timed_out=True)) if graded else ()
    return Group(Prompt(3, "what is <1+1>?", (1, 2), {"answer": "2"}), completions, rewards)


def test_metrics_are_on_the_disk_before_a_checkpoint_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path / "run")
    synced: list[tuple[int, int]] = []

    def record(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced.append((status.st_ino, status.st_size))

    with RunLogger(make_config(), run, is_main=True, start_step=0) as logger:
        logger.log_event("a line")
        monkeypatch.setattr(os, "fsync", record)
        logger.sync()
    status = run.metrics.stat()
    assert synced == [(status.st_ino, status.st_size)] and status.st_size > 0


def test_rollouts_are_written_one_completion_a_line(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)

    def decode(ids: Any) -> str:
        return "".join(map(chr, ids)) + "é\udc80"  # a lone surrogate must not stop the run

    with RunLogger(make_config(), run, is_main=True, start_step=0) as logger:
        logger.write_rollouts(12, [make_group(graded=True)] * 3, decode, limit=1)
        logger.write_rollouts(13, [make_group(graded=False)], decode, limit=5)
        logger.write_rollouts(14, [make_group(graded=True)], decode, limit=0)
    rows = [json.loads(line) for line in (tmp_path / "rollouts" / "step-000012.jsonl").read_text("utf-8").splitlines()]
    assert [(r["response"][:2], r["reward"], r["correct"], r["timed_out"], r["finish_reason"]) for r in rows] == [
        ("AB", 1.0, True, False, "stop"),
        ("Cé", -0.5, False, True, "length"),
    ]
    assert rows[0]["response"] == "ABé\udc80"
    assert bytes(rows[0]["response_ids"]) == b"AB" and rows[0]["prompt_ids"] == list(
        make_group(graded=True).prompt.token_ids
    )
    assert rows[0]["prompt"] == "what is <1+1>?" and rows[0]["policy_version"] == 7 and rows[0]["num_tokens"] == 2
    ungraded = [json.loads(line) for line in run.rollouts(13).read_text("utf-8").splitlines()]
    assert [r["reward"] for r in ungraded] == [None, None]
    assert not run.rollouts(14).exists()


class FullDisk:
    """A file on a disk with room for `room` bytes more."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: bytes) -> int:
        if not self._room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._file.write(data[: self._room])
        self._room -= written
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("room", [0, 1, 40])
def test_metrics_on_a_full_disk_are_one_sentence_and_no_half_line(room: int, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with (
        pytest.raises(ReheatError) as failure,
        RunLogger(make_config(), run, is_main=True, start_step=0) as logger,
    ):
        logger.log_step(record(1))
        whole = run.metrics.read_bytes()
        logger._file = FullDisk(logger._file, room)
        logger.log_step(record(2))
    assert str(failure.value).startswith(f"cannot write {run.metrics}: No space left on device; make room there")
    assert run.metrics.read_bytes() == whole
    log_steps(tmp_path, range(2, 3), start_step=1)
    assert steps_of(tmp_path) == [1, 2]


def test_rollouts_on_a_full_disk_are_one_sentence_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = RunFolder(tmp_path)
    with RunLogger(make_config(), run, is_main=True, start_step=0) as logger:
        logger.write_rollouts(1, [make_group(graded=True)], str, limit=1)
        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(ReheatError, match=r"step-000002\.jsonl: No space left on device; make room there"):
            logger.write_rollouts(2, [make_group(graded=True)], str, limit=1)
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step-000001.jsonl"]


def test_a_full_disk_at_the_start_leaves_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = log_steps(tmp_path, range(1, 6))
    whole = run.metrics.read_bytes()

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ReheatError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
        log_steps(tmp_path, range(4, 6), start_step=3)
    assert run.metrics.read_bytes() == whole and not list(tmp_path.glob("*.tmp"))


def test_console_is_aligned_plain_and_fits(tmp_path: Path) -> None:
    out = io.StringIO()
    held_out = {"data": {"path": "e"}, "num_samples": 4, "suites": {"hard": {"path": "h", "num_samples": 32}}}
    config = make_config(logging={"console": True}, run={"steps": 20000}, eval=held_out)
    parts = ("step", "rollout", "reward", "score", "update", "sync")
    full = METRICS | {
        "reheat/kl": 0.00312,
        "rollout/mismatch_kl": 0.0012,
        "throughput/tokens_per_s": 123456.0,
        **dict.fromkeys((f"time/{part}_s" for part in parts), 1234.5),
    }
    with RunLogger(config, RunFolder(tmp_path), is_main=True, start_step=0, console=Console(file=out)) as logger:
        for step in range(1, HEADER_EVERY + 2):
            logger.log_step(record(step, metrics=METRICS))
        logger.log_step(record(12345, stage="reheat", round=1, metrics=full))
        logger.log_step(record(12346, metrics={"eval/avg_at_k": 0.5, "eval/pass_at_k": 0.75, "eval/entropy": 0.1}))
        logger.log_step(record(12347, metrics={"eval/hard/avg_at_k": 0.25, "eval/hard/entropy": 0.2}))
        logger.log_event("entropy [0.078] < 0.08 nats: entering reheat round 1")
    text = out.getvalue()
    assert "\x1b" not in text
    lines = text.splitlines()
    assert [number for number, line in enumerate(lines) if line.startswith("stage")] == [0, HEADER_EVERY + 1]
    table = [line for line in lines if line.startswith(("stage", "rlvr", "reheat"))]
    assert {len(line) for line in table} == {len(table[0])} and len(table[0]) <= 120
    words = [" ".join(line.split()) for line in lines]
    assert words[1] == "rlvr 1/20000 0.500 25.0 0.079 - - - 12.0 - - - - - -"
    row = "reheat 12345/20000 0.500 25.0 0.079 3.1e-03 1.2e-03 123,456" + " 1234" * len(parts)  # whole seconds
    assert any(line.startswith(row) for line in words)
    assert words[-3:-1] == [
        "eval 12346/20000 avg@4 0.500 pass@4 0.750 entropy 0.100",
        "eval 12347/20000 avg@32 0.250 entropy 0.200 hard",
    ]
    assert lines[-1] == "--- entropy [0.078] < 0.08 nats: entering reheat round 1"  # not read as markup


def test_console_colours_the_stage_on_a_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, color_system="256")
    config = make_config(logging={"console": True})
    with RunLogger(config, RunFolder(tmp_path), is_main=True, start_step=0, console=terminal) as logger:
        logger.log_step(record(1))
    assert "\x1b[32mrlvr  \x1b[0m" in out.getvalue()


def test_tensorboard_holds_the_values_and_forgets_discarded_steps(tmp_path: Path) -> None:
    logging = {"tensorboard": True}
    log_steps(tmp_path, range(1, 6), logging=logging)
    run = log_steps(tmp_path, range(4, 5), start_step=3, logging=logging)
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("entropy/mean")] == [
        (step, 0.0789) for step in (1, 2, 3, 4)
    ]


def test_missing_wandb_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ReheatError, match=r"pip install wandb, or clear logging\.wandb_project"):
        log_steps(tmp_path, range(1, 2), logging={"wandb_project": "reheat"})


def test_wandb_offline_writes_a_run_and_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logging = {"wandb_project": "reheat"}
    log_steps(tmp_path, range(1, 4), logging=logging)
    run_id = (tmp_path / "wandb_id").read_text()
    log_steps(tmp_path, range(4, 5), start_step=3, logging=logging)
    assert (tmp_path / "wandb_id").read_text() == run_id
    stored = list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(stored) >= 1
    assert any(b"entropy/mean" in path.read_bytes() for path in stored)


@pytest.mark.parametrize(("module", "key"), [("mlflow", "mlflow_experiment"), ("trackio", "trackio_project")])
def test_a_missing_tracker_says_what_to_do(
    module: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ReheatError, match=rf"logging\.{key} is 'reheat' but {module} is not installed; pip install {module}"
    ):
        log_steps(tmp_path, range(1, 2), logging={key: "reheat"})
