"""Forked ranks are as those with an interpreter of their own, and a launcher that nohup has started outlives its terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.default_signals import hear_signals

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from megatron_reheat.cluster.launch import launch_here
from megatron_reheat.run_folder import RunFolder

place, ignored = Path(sys.argv[1]), signal.Signals[sys.argv[2]]
signal.signal(ignored, signal.SIG_IGN)

def rank():
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)]
    print(os.getsid(0) == os.getpid(), *(int(handler) for handler in handlers), flush=True)
    while not (place / "go").exists():
        time.sleep(0.05)
    return 0

sys.exit(launch_here(2, rank, RunFolder(place)))
"""
IGNORED, DEFAULT = int(signal.SIG_IGN), int(signal.SIG_DFL)


@pytest.mark.parametrize(("ignored", "status"), [("SIGHUP", 0), ("SIGUSR2", 128 + signal.SIGHUP)])
def test_a_terminal_that_closes(tmp_path: Path, ignored: str, status: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path), ignored],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_signals,
    )
    assert process.stdout is not None
    try:
        ranks = [process.stdout.readline().split() for _ in range(2)]
        hangup = IGNORED if ignored == "SIGHUP" else DEFAULT
        assert ranks == [["True", *map(str, (DEFAULT, hangup, DEFAULT))]] * 2
        os.killpg(process.pid, signal.SIGHUP)
        if not status:
            (tmp_path / "go").touch()
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()  # its ranks end with it
    assert process.returncode == status, errors
    assert ("error: stopped by SIGHUP" in errors) == bool(status)
