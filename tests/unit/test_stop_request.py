"""The notice to save and end: SIGUSR1, SIGTERM and Ctrl-C, held and awaited in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_reheat import stop_request
from megatron_reheat.cluster.launch import is_launchers_own
from tests.default_signals import hear_signals

ROOT = Path(__file__).resolve().parents[2]


def test_a_held_notice_waits_and_is_inherited() -> None:
    """Python starts, holds the signal, gets it, and neither dies nor loses it; a process it starts survives it too."""
    code = """
import os, subprocess, sys
from megatron_reheat import stop_request
from megatron_reheat.cluster.launch import is_launchers_own
stop_request.hold_stop_signals()
assert not stop_request.stop_requested()
os.kill(os.getpid(), stop_request.STOP_SIGNAL)
assert stop_request.stop_requested() and stop_request.stop_requested()
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
child.send_signal(stop_request.STOP_SIGNAL)
child.communicate(b"go on\\n")
sys.exit(child.returncode)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


def test_a_launcher_passes_the_notice_on_to_ranks_that_start_later() -> None:
    code = """
import os, signal, subprocess, sys
from megatron_reheat import stop_request
from megatron_reheat.cluster.launch import is_launchers_own
stop_request.hold_stop_signals()
stop_request.pass_on_stop_signal()
os.kill(os.getpid(), stop_request.STOP_SIGNAL)
rank = "import time; from megatron_reheat.stop_request import stop_requested as s\\nwhile not s(): time.sleep(0.05)"
sys.exit(subprocess.run([sys.executable, "-c", rank], timeout=30).returncode)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


INTERRUPTED = """
import ctypes, functools, sys, time
from pathlib import Path
from megatron_reheat import stop_request
from megatron_reheat.cluster.launch import is_launchers_own
from megatron_reheat.run_folder import RunFolder
stop_request.hold_stop_signals()
folder = RunFolder(Path(sys.argv[1]))
stopped = functools.partial(stop_request.stopped_by, folder=folder)
final = int(sys.argv[3]).__eq__
stop_request.StopWatch(stopped, "stopping soon", float(sys.argv[2]), is_final=final).start()
print("ready", flush=True)
while not stop_request.stop_requested():
    time.sleep(0.01)
print("asked", flush=True)
ctypes.CDLL(None).pause()  # as stuck as a main thread can be: no Python handler would ever run
"""


def interrupted(
    folder: Path, number: int = signal.SIGINT, grace_s: float = 60, final_from: int = 0
) -> subprocess.Popen[str]:
    """A process that has had a notice and does not heed it."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(folder), str(grace_s), str(final_from)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_signals,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    if not final_from:
        assert process.stdout.readline() == "asked\n"
    return process


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ([], "nothing is saved yet, the same command starts anew"),
        (["step-9", "step-10", ".step-11.partial"], "the same command goes on from step 10, the latest that is saved"),
    ],
)
def test_the_first_interrupt_is_the_notice_and_the_second_ends_it_at_once(
    tmp_path: Path, saved: list[str], words: str
) -> None:
    for name in saved:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    process = interrupted(tmp_path)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (128 + signal.SIGINT, "")
    first, second = errors.splitlines()
    assert first == "stopping soon; Ctrl-C again stops at once" and second == f"error: stopped by SIGINT; {words}"


def test_sigterm_is_the_notice_and_what_is_not_done_in_its_grace_time_ends(tmp_path: Path) -> None:
    process = interrupted(tmp_path, signal.SIGTERM, grace_s=0.5)
    process.send_signal(signal.SIGTERM)  # again: as schedulers do, and no reason to hurry
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (128 + signal.SIGTERM, "")
    assert errors.splitlines() == [
        "stopping soon; at the latest 0.5 s from now (run.stop_grace_s)",
        "error: stopped by SIGTERM, whose grace time of 0.5 s (run.stop_grace_s) is over; nothing is saved yet, the same "
        "command starts anew",
    ]


def test_ctrl_c_in_the_grace_time_of_sigterm_stops_at_once(tmp_path: Path) -> None:
    process = interrupted(tmp_path, signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT and "error: stopped by SIGINT; nothing is saved" in errors


def test_sigterm_of_the_launcher_is_no_notice(tmp_path: Path) -> None:
    """So it ends the other ranks when one has failed, which no save would get over."""
    process = interrupted(tmp_path, signal.SIGTERM, final_from=os.getpid())
    assert process.communicate(timeout=60) == ("", "") and process.returncode == -signal.SIGTERM


HELPER = """
import os, signal, sys
from megatron_reheat.processes import await_signals, die_with_parent
die_with_parent(int(sys.argv[1]), "test", signal.SIGTERM)
print("ready", flush=True)
print(await_signals(int(sys.argv[1])), flush=True)
"""


@pytest.mark.parametrize("parent_dies", [False, True])
def test_a_helper_ends_with_its_parent_only(parent_dies: bool) -> None:
    """A scheduler that signals every process of a job means the run, which needs its helpers until it has saved."""
    code = f"""
import os, signal, subprocess, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
child = subprocess.Popen([sys.executable, "-c", {HELPER!r}, str(os.getpid())], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.readline()
{"os._exit(0)" if parent_dies else "child.terminate(); print(child.stdout.readline().decode())"}
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    helper = psutil.Process(int(parent.stdout.readline()))
    for _ in range(3):
        helper.terminate()
    with pytest.raises(psutil.TimeoutExpired):
        helper.wait(0.3)
    output, _ = parent.communicate("\n", timeout=60)
    assert output.strip() == ("" if parent_dies else str(int(signal.SIGTERM)))
    psutil.wait_procs([helper], timeout=30)
    assert not helper.is_running()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_ignored_interrupt_stays_ignored(name: str) -> None:
    """A shell has commands behind `&` in a script ignore Ctrl-C: it is meant for what runs in front."""
    code = f"""
import os, signal
from megatron_reheat import stop_request
from megatron_reheat.cluster.launch import is_launchers_own
signal.signal(signal.{name}, signal.SIG_IGN)
stop_request.hold_stop_signals()
stop_request.StopWatch(lambda reason: "never said", "never said").start()
os.kill(os.getpid(), signal.{name})
assert not stop_request.stop_requested()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=True, capture_output=True)
    assert done.stderr == b""


def test_what_an_interrupted_run_says_of_its_step() -> None:
    assert stop_request.asked_to_stop(7) == "asked to stop after step 7; the same command goes on from there"
    assert "before the first step; nothing is saved yet" in stop_request.asked_to_stop(0)


def test_nobody_who_listens_is_no_reason_to_go_on(tmp_path: Path) -> None:
    """Ctrl-C ends the `tee` behind a run as well."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path), "60", "0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_signals,
    )
    assert process.stdout.readline() == "ready\n"
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT


def test_torchruns_sigterm_is_final_only_where_a_rank_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sends the same when it is told to end and when one of its ranks has failed."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert not is_launchers_own(os.getppid())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4096")
    assert is_launchers_own(os.getppid()) and not is_launchers_own(os.getpid())
    monkeypatch.delenv("LOCAL_WORLD_SIZE")  # not under torchrun at all
    assert not is_launchers_own(os.getppid())
