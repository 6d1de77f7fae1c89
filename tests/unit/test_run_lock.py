"""Who may write into a run folder; the holders here are real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_reheat import run_lock
from megatron_reheat.errors import ConfigError
from megatron_reheat.run_lock import NAME, RunLock

HOLD = """
import sys, time
from pathlib import Path
from megatron_reheat.errors import ConfigError
from megatron_reheat.run_lock import RunLock
try:
    with RunLock(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
except ConfigError:
    print("refused", flush=True)
"""


def holder(folder: Path, seconds: float = 60.0) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", HOLD, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True)


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def rewrite(folder: Path, age: float = 0.0, **changes: str) -> None:
    """As if another process had written the lock so many seconds ago."""
    path = folder / NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    os.utime(path, (time.time() - age,) * 2)


@pytest.fixture
def left_behind(tmp_path):
    """A folder with the lock of a process that was killed."""
    process = holder(tmp_path)
    assert says(process) == "held"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / NAME).exists()
    return tmp_path


def test_a_second_run_is_refused_by_name_while_the_first_one_lives(tmp_path):
    process = holder(tmp_path)
    try:
        assert says(process) == "held"
        with pytest.raises(ConfigError) as refusal, RunLock(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()
    assert f"{tmp_path} is in use by process {process.pid} on " in str(refusal.value)
    assert "another run.name" in str(refusal.value) and str(tmp_path / NAME) in str(refusal.value)


def test_a_process_that_has_ended_holds_nothing_although_its_parent_has_not_noticed(tmp_path):
    process = holder(tmp_path)
    assert says(process) == "held"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    with RunLock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    process.wait()


def test_what_is_no_file_is_no_lock_and_stays(tmp_path):
    os.mkfifo(tmp_path / NAME)
    with (
        pytest.raises(ConfigError, match=r"run\.lock is not a file, so no run's lock; move it away"),
        RunLock(tmp_path),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_what_a_killed_run_left_is_taken_over_at_once(left_behind):
    with RunLock(left_behind):
        assert json.loads((left_behind / NAME).read_text())["pid"] == os.getpid()
    assert list(left_behind.iterdir()) == []


def test_another_process_of_the_same_id_is_not_the_holder(left_behind):
    rewrite(left_behind, pid=str(os.getpid()))  # this process lives, but started at another time
    with RunLock(left_behind):
        pass


def test_a_lock_from_another_machine_is_void_when_nobody_touches_it(left_behind, capsys):
    rewrite(left_behind, age=run_lock.VOID_AFTER_S + 1, place="elsewhere", host="node-7")
    with RunLock(left_behind):
        pass
    rewrite_new(left_behind, age=run_lock.VOID_AFTER_S - 1)  # killed a minute ago, and the job is queued again
    with RunLock(left_behind):
        pass
    assert "waiting to see whether node-7 still uses" in capsys.readouterr().out


def rewrite_new(folder: Path, age: float) -> None:
    with RunLock(folder):
        text = (folder / NAME).read_text()
    (folder / NAME).write_text(text)
    rewrite(folder, age=age, place="elsewhere", host="node-7")


def test_a_lock_from_another_machine_holds_as_long_as_it_is_touched(left_behind):
    rewrite(left_behind, place="elsewhere", host="node-7")
    touch = "import os, sys, time\nwhile True: time.sleep(1); os.utime(sys.argv[1])"
    toucher = subprocess.Popen([sys.executable, "-c", touch, str(left_behind / NAME)])
    try:
        with pytest.raises(ConfigError, match=r"in use by process .* on node-7"), RunLock(left_behind):
            pass
    finally:
        toucher.kill()
        toucher.wait()


def test_a_run_that_comes_to_nothing_leaves_no_folder(tmp_path):
    with RunLock(tmp_path / "runs" / "a"):
        assert (tmp_path / "runs" / "a" / NAME).exists()
    assert list(tmp_path.iterdir()) == []
    with RunLock(tmp_path / "runs" / "b"):
        (tmp_path / "runs" / "b" / "config.yaml").touch()
    assert (tmp_path / "runs" / "b" / "config.yaml").exists()


def test_the_holder_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "TOUCH_EVERY_S", 0.05)
    with RunLock(tmp_path):
        os.utime(tmp_path / NAME, (0, 0))
        deadline = time.monotonic() + 20
        while (tmp_path / NAME).stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_damaged_lock_does_not_last(tmp_path):
    (tmp_path / NAME).write_text("{")
    with RunLock(tmp_path):
        pass
    assert not (tmp_path / NAME).exists()


def test_of_many_that_find_a_void_lock_exactly_one_gets_it(left_behind):
    processes = [holder(left_behind, seconds=4.0) for _ in range(6)]
    answers = [says(p) for p in processes]
    assert sorted(answers) == ["held", *["refused"] * 5]
    for process in processes:
        process.wait()
    assert list(left_behind.iterdir()) == []


def test_a_file_system_without_links_will_do(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    with RunLock(tmp_path), pytest.raises(ConfigError), RunLock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_put_up_since_the_void_one_was_judged_stays(tmp_path):
    with RunLock(tmp_path):
        fresh = (tmp_path / NAME).read_text()
        late = RunLock(tmp_path)
        late._take_away(run_lock.Holder("node-7", "elsewhere", 1, "0", "of before"))
        assert (tmp_path / NAME).read_text() == fresh
    assert list(tmp_path.iterdir()) == []
