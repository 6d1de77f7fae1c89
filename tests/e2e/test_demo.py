"""`scripts/demo.sh` ends what it started: the installation it waits for, and the runs with their ranks and engines."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.default_signals import hear_signals
from tests.e2e import runs

GONE_WITHIN_S = 30.0
# installs for ever: a child of its own, as pip would be, and a line that shows that it has begun
SLOW_SETUP = """
sleep 600 &
echo installing
wait
"""
# ends with a status of its own after a moment, as a run does that saves first
WAITING_RUN = """
import signal, sys, time
numbers = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
print(sys.argv[1], flush=True)
if sys.argv[1] == "train":
    got = signal.sigwait(numbers)
    time.sleep(0.3)
    assert not signal.sigpending(), "it came twice"
    print("got", got.name, flush=True)
    sys.exit(85)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what the demo needs, with the environment that this test runs in."""
    root = tmp_path / "project"
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / "scripts").mkdir()
    shutil.copy(runs.ROOT / "scripts" / "demo.sh", root / "scripts")
    for folder in ("examples/countdown_cpu", "yaml"):
        shutil.copytree(runs.ROOT / folder, root / folder)
    python = root / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (root / "scripts" / "setup_env.sh").write_text("exit 0\n")
    return root


def start(project: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(project / "scripts" / "demo.sh"), *arguments],
        env={**os.environ, "PYTHONPATH": str(runs.ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=hear_signals,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + runs.LIMIT_S
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def output_of(process: subprocess.Popen[str], started: list[psutil.Process]) -> str:
    """What it printed, once it and all that it had started are gone."""
    try:
        output, _ = process.communicate(timeout=runs.LIMIT_S)
        _, alive = psutil.wait_procs(started, timeout=GONE_WITHIN_S)
        assert alive == []
    finally:
        for left in started:
            if left.is_running():
                left.kill()
    return output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_installation_ends_with_it(project: Path, number: signal.Signals) -> None:
    (project / "scripts" / "setup_env.sh").write_text(SLOW_SETUP)
    process = start(project)
    assert process.stdout.readline() == "installing\n"
    wait_for(lambda: any(p.name() == "sleep" for p in descendants(process)), process)
    started = descendants(process)
    process.send_signal(number)
    output_of(process, started)
    assert process.returncode == 128 + number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_ends_with_it(project: Path, number: signal.Signals) -> None:
    seed = project / "runs" / "countdown" / "seed-5"
    make_task = [sys.executable, str(project / "examples" / "countdown_cpu" / "make_task.py"), str(seed / "task")]
    subprocess.run([*make_task, "--train", "300", "--eval", "8"], check=True)
    process = start(project, "--seed", "5")
    wait_for(lambda: runs.steps_of(seed / "trunk") != [], process)
    started = descendants(process)
    commands = [" ".join(p.cmdline()) for p in started]
    assert (
        sum("megatron_reheat train" in c for c in commands) == 3
        and sum("rollout.fork_server" in c for c in commands) == 3  # itself, and two engines
    )
    process.send_signal(number)
    output = output_of(process, started)
    assert "Traceback" not in output, output[-3000:]
    if number == signal.SIGINT:  # the run saved first
        assert "stopping after the step in progress" in output and "asked to stop after step" in output
        assert len(list((seed / "trunk" / "checkpoints").glob("step-*"))) == 1
    assert process.returncode == 128 + number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_example_script_passes_signals_on_to_its_run(tmp_path: Path, number: signal.Signals) -> None:
    """Its runs need GPUs; here they only say that they have begun, and what ends them."""
    run = tmp_path / "reheat"
    run.write_text(f"#!{sys.executable}\n{WAITING_RUN}")
    run.chmod(0o755)
    process = subprocess.Popen(
        ["bash", str(runs.ROOT / "examples" / "qwen3_8b" / "run.sh")],
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_signals,
    )
    assert process.stdout.readline() == "check\n"
    assert process.stdout.readline() == "train\n"
    started = descendants(process)
    process.send_signal(number)
    assert output_of(process, started) == f"got {number.name}\n"
    assert process.returncode == 85
