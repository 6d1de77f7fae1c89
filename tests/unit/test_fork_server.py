"""Engine processes that are forked of one interpreter: who gets one, where it prints, and how it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_reheat.errors import EngineDied
from megatron_reheat.recipe import parse_config
from megatron_reheat.rollout import fork_server as module
from megatron_reheat.rollout import head_start
from megatron_reheat.rollout.child_process import ChildProcess
from megatron_reheat.rollout.fork_server import ForkServer
from megatron_reheat.rollout.head_start import HeadStart, start_fork_server
from tests.unit.test_config import recipe

# the server as it is, with something shorter in place of vLLM
PROGRAM = """
import os, sys, time
from megatron_reheat.rollout import fork_server

def engine(connection):
    print("late", flush=True)
    while True:
        request, operation, arguments = connection.recv()
        if operation == "exit":
            return 0
        if operation == "raise":
            raise ValueError("cannot")
        if operation == "think":
            time.sleep(3600)
        connection.send((request, (os.getpid(), os.getppid(), os.getsid(0))))

fork_server.import_engine = lambda: print("early", flush=True)
fork_server.run_engine = engine
code = fork_server.main()
sys.stdout.flush()
os._exit(code)
"""
ANSWER_S = 60.0


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "SERVER_MODULE", "program")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    (path := tmp_path / "program.py").write_text(PROGRAM)
    return path


@pytest.fixture
def server(program: Path) -> Iterator[ForkServer]:
    with ForkServer({"OMP_NUM_THREADS": "1"}) as server:
        yield server


def forked(server: ForkServer, log: Path) -> ChildProcess:
    return ChildProcess("", [], env={}, log_file=log, fork=server.fork)


def ask(child: ChildProcess, operation: str = "who") -> tuple[int, int, int]:
    answer: tuple[int, int, int] = child.call(operation, timeout_s=ANSWER_S, timeout_key="")
    return answer


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + ANSWER_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_every_engine_is_a_process_with_a_log_of_its_own(server: ForkServer, tmp_path: Path) -> None:
    children = [forked(server, tmp_path / "logs" / f"{name}.log") for name in "ab"]
    answers = [ask(child) for child in children]
    assert [pid for pid, _, _ in answers] == [child.pid for child in children] == [sid for _, _, sid in answers]
    assert {parent for _, parent, _ in answers} == {server.pid}
    for child, name in zip(children, "ab", strict=True):
        assert (tmp_path / "logs" / f"{name}.log").read_text().splitlines()[::2] == ["early", "late"]
        assert child.alive
        child.end()
        assert not child.alive and child._process.wait() == 0


def test_how_it_ended_is_told_with_the_end_of_its_log(server: ForkServer, tmp_path: Path) -> None:
    child, other = (forked(server, tmp_path / f"{name}.log") for name in "ab")
    with pytest.raises(EngineDied, match=r"exited with code 1 during 'raise'(.|\n)*ValueError: cannot"):
        ask(child, "raise")
    child.end()
    pid, _, _ = ask(other)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineDied, match=f"engine process {pid} was killed by signal 9 during 'who'"):
        ask(other)
    third = forked(server, tmp_path / "b.log")  # as after a death
    assert ask(third)[0] not in (child.pid, pid)
    third.kill()
    assert third._process.wait() == -signal.SIGKILL


def test_it_ends_with_the_rank_that_asked_for_it(server: ForkServer, tmp_path: Path) -> None:
    """Ranks are forked too, and share the server. An engine in the middle of something ends as well."""
    context = multiprocessing.get_context("fork")
    pids = context.SimpleQueue()

    def rank(name: str) -> None:
        child = forked(server, tmp_path / f"{name}.log")
        pids.put(ask(child)[0])
        child.send("think", timeout_s=ANSWER_S)
        time.sleep(ANSWER_S)

    ranks = [context.Process(target=rank, args=(name,)) for name in "ab"]
    engines = []
    for one in ranks:
        one.start()
        engines.append(pids.get())
    ranks[0].kill()
    wait_until(lambda: gone(engines[0]))
    assert not gone(engines[1])
    ranks[1].kill()
    wait_until(lambda: gone(engines[1]))
    for one in ranks:
        one.join()
    assert server.alive


def test_nothing_outlives_the_server_and_its_launcher(program: Path, tmp_path: Path) -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(tmp_path)!r})
from pathlib import Path
from megatron_reheat.rollout import fork_server
from megatron_reheat.rollout.child_process import ChildProcess
fork_server.SERVER_MODULE = "program"
server = fork_server.ForkServer({{}})
child = ChildProcess("", [], env={{}}, log_file=Path({str(tmp_path / "log")!r}), fork=server.fork)
print(server.pid, child.call("who", timeout_s={ANSWER_S}, timeout_key="")[0], flush=True)
child.send("think", timeout_s={ANSWER_S})
time.sleep({ANSWER_S})
"""
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    started = list(map(int, launcher.stdout.readline().split()))
    launcher.kill()
    launcher.wait()
    wait_until(lambda: all(map(gone, started)))


def test_an_engine_that_is_given_up_before_it_is_forked_ends(program: Path, tmp_path: Path) -> None:
    blocked = f"lambda: open({str(tmp_path / 'go')!r}).read()"
    program.write_text(PROGRAM.replace('lambda: print("early", flush=True)', blocked))
    os.mkfifo(tmp_path / "go")
    with ForkServer({}) as server:
        child = forked(server, tmp_path / "log")
        assert child.alive
        child.kill()
        assert not child.alive and child._process.wait() == -signal.SIGKILL
        child.end()
        (tmp_path / "go").write_text("")
        wait_until(lambda: "EOFError" in (tmp_path / "log").read_text())
        assert ask(forked(server, tmp_path / "log"))[1] == server.pid


def test_a_server_that_ended_forks_nothing(server: ForkServer, tmp_path: Path) -> None:
    child = forked(server, tmp_path / "log")
    pid, _, _ = ask(child)
    server.kill()
    wait_until(lambda: gone(pid))
    with pytest.raises(EngineDied, match=f"engine process {pid} was killed by signal 9"):
        ask(child)
    with pytest.raises(OSError):
        forked(server, tmp_path / "log")


def test_a_run_takes_its_engines_from_it(server: ForkServer, tmp_path: Path) -> None:
    """As often as it asks for one like those; else, and where the server is gone, it starts an interpreter of its own."""
    config = parse_config(recipe(run={"folder": str(tmp_path / "run"), "steps": 3}))
    with HeadStart(config, 2, server) as waiting:
        taken = [waiting.take([], server.variables, tmp_path / "log") for _ in range(2)]
        assert all(child is not None and ask(child)[1] == server.pid for child in taken)
        assert waiting.take([], {**server.variables, "OMP_NUM_THREADS": "7"}, tmp_path / "log") is None
        assert waiting.take(["0,1"], server.variables, tmp_path / "log") is None
        server.kill()
        assert waiting.take([], server.variables, tmp_path / "log") is None
    for child in taken:
        assert child is not None
        child.end()


def test_no_engines_no_server(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(**sections: object) -> bool:
        tree = recipe(run={"folder": str(tmp_path / "run"), "steps": 3}, **sections)
        server = start_fork_server(parse_config(tree), 2)
        if server is not None:
            server.kill()
        return server is not None

    assert started()
    assert not started(rollout={"mode": "server"})
    monkeypatch.setattr(head_start, "has_gpus", lambda: True)
    assert not started()


def test_a_machine_that_starts_no_process_says_so_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path))
    assert start_fork_server(parse_config(recipe(run={"folder": str(tmp_path / "run"), "steps": 3})), 2) is None
