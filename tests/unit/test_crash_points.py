"""A tenth of the failures of a disk in scripts/faults/crash_points.py, and that it sees a save that does not sync."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from scripts.faults.crash_points import Log, points_of
from tests.e2e.runs import ROOT


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_save_that_fails_anywhere_leaves_a_whole_checkpoint() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "scripts.faults.crash_points", "--every", "10"]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    rows = {line.split()[0]: [int(n) for n in line.split()[1:]] for line in done.stdout.splitlines()[2:-1]}
    assert rows.keys() == {"ENOSPC", "EDQUOT", "EROFS", "EIO"}
    for points, refused, one_sentence, whole, _ in rows.values():
        assert refused > 0 and points == one_sentence == whole > 4


BEFORE = {"/c": None, "/c/latest": b"old"}
CALLS = [["create", "/c/new"], ["write", "/c/new"], ["write", "/c/new"], ["write", "/c/new"], ["sync", "/c/new"],
         ["rename", "/c/new", "/c/latest"], ["sync", "/c"]]  # fmt: skip


def test_what_is_not_synced_is_lost_and_what_is_stays() -> None:
    log = Log(CALLS, BEFORE, {"/c": None, "/c/latest": b"new"})
    assert points_of(CALLS) == [0, 1, 3, 4, 5, 6]
    assert log.after_loss(4, 4) == {**BEFORE, "/c/new": b""}  # its folder's entry outlasted its content
    assert log.after_loss(4, 0) == BEFORE
    assert log.after_loss(5, 5) == {**BEFORE, "/c/new": b"new"}
    assert log.after_loss(6, 5) == {**BEFORE, "/c/new": b"new"} and log.after_loss(6, 0) == BEFORE
    assert log.after_loss(7, 0) == {"/c": None, "/c/latest": b"new"}  # the folder is synced


def test_a_pointer_that_is_replaced_before_its_content_is_synced_may_be_empty() -> None:
    hasty = [call for call in CALLS[:6] if call[0] != "sync"]
    log = Log(hasty, BEFORE, {"/c": None, "/c/latest": b"new"})
    assert log.after_loss(len(hasty), len(hasty)) == {"/c": None, "/c/latest": b""}
