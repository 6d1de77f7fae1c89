"""Servers that end or hang by themselves, kept by `reheat serve`; stand-ins here, vLLM's own in the end-to-end tests."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_reheat.config import RolloutConfig
from megatron_reheat.errors import EngineDied
from megatron_reheat.ports import free_port
from megatron_reheat.rollout.module_process import ModuleProcess
from megatron_reheat.rollout.server import client, keeper, process, restarts
from megatron_reheat.rollout.server.client import Network
from megatron_reheat.rollout.server.keeper import Keeper
from megatron_reheat.rollout.server.process import ServerProcess
from megatron_reheat.rollout.server.restarts import RestartLimit

LIMIT_S = 60.0


class StandIn(ServerProcess):
    def __init__(self, port: int, folder: Path) -> None:
        self.port, self._mark, self._sockets = port, "none", str(folder / "sockets")
        arguments = [str(port), str(folder / "broken")]
        ModuleProcess.__init__(
            self, "tests.unit.stand_in_server", arguments, env=os.environ, log_file=folder / f"{port}.log"
        )


class Kept:
    """Two stand-ins and the thread that keeps them; `error` is what ended it."""

    def __init__(self, folder: Path, config: RolloutConfig) -> None:
        self.ports = [free_port() for _ in range(2)]
        self.started: dict[int, list[StandIn]] = {port: [] for port in self.ports}
        self.broken = folder / "broken"
        self.error: Exception | None = None
        self._stop = threading.Event()
        self._keeper = Keeper(
            {f"http://gpu-7:{port}": self._starter(port, folder) for port in self.ports}, "127.0.0.1", config
        )
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _starter(self, port: int, folder: Path) -> Callable[[], ServerProcess]:
        def start() -> StandIn:
            self.started[port].append(StandIn(port, folder))
            return self.started[port][-1]

        return start

    def _watch(self) -> None:
        try:
            self._keeper.watch(self._stop)
        except EngineDied as error:
            self.error = error
        finally:
            self._keeper.end()

    def ended(self) -> str:
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()
        return str(self.error)

    def close(self) -> None:
        self._stop.set()
        self.ended()
        assert not any(process.alive for processes in self.started.values() for process in processes)


@pytest.fixture
def keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Kept]]:
    monkeypatch.setattr(keeper, "LOOK_S", 0.05)
    monkeypatch.setattr(keeper, "POLL_S", 0.05)
    for module in (client, keeper):
        monkeypatch.setattr(module, "ANSWER_WAIT_S", 1.0)
    kept: list[Kept] = []

    def start(**config: float) -> Kept:
        kept.append(Kept(tmp_path, RolloutConfig(**{"timeout_s": 2.0, "start_timeout_s": 60.0, **config})))
        return kept[-1]

    yield start
    for one in kept:
        one.close()


def printed(capsys: pytest.CaptureFixture[str], *expected: str) -> None:
    """Waits for these lines, in any order; nothing else is printed."""
    text, deadline = "", time.monotonic() + LIMIT_S
    while text.count("\n") < len(expected):
        assert time.monotonic() < deadline, text
        time.sleep(0.02)
        text += capsys.readouterr().out
    lines = [re.sub(r"ready after \d+ s", "ready", line) for line in text.splitlines()]
    assert sorted(lines) == sorted(expected)


def test_a_server_that_dies_or_hangs_is_started_again_at_its_address(
    keep: Callable[..., Kept], capsys: pytest.CaptureFixture[str]
) -> None:
    kept = keep()
    first, second = (f"http://gpu-7:{port}" for port in kept.ports)
    printed(capsys, f"{first} ready", f"{second} ready")
    again = "started again, number {} of 2 restarts within an hour (rollout.max_restarts)"
    one, other = kept.ports

    os.kill(kept.started[one][0].pid, signal.SIGKILL)
    printed(capsys, f"{first} was killed by signal 9; {again.format(1)}", f"{first} ready")

    network = Network(None)
    network.run(network.client(f"http://127.0.0.1:{one}", 5).ask_to_end())
    printed(capsys, f"{first} exited with code 75, which its trainer asked for; {again.format(2)}", f"{first} ready")
    network.close()

    with socket.create_connection(("127.0.0.1", other)) as lost:
        lost.sendall(b"GET /hang HTTP/1.0\r\n\r\n")
        printed(capsys, f"{second} did not answer for 2 s and was ended; {again.format(1)}", f"{second} ready")
    assert [len(kept.started[port]) for port in kept.ports] == [3, 2]

    os.kill(kept.started[one][-1].pid, signal.SIGKILL)
    message = rf"the vLLM server on port {one} was killed by signal 9; it has had its 2 restarts within an hour \(rollout\.max_"
    assert re.match(message, kept.ended())


@pytest.mark.parametrize("at_first", [True, False])
def test_one_that_dies_before_it_is_ready_ends_all_with_its_log(
    keep: Callable[..., Kept], capsys: pytest.CaptureFixture[str], tmp_path: Path, at_first: bool
) -> None:
    if at_first:
        (tmp_path / "broken").touch()
    kept = keep()
    if not at_first:
        printed(capsys, *(f"http://gpu-7:{port} ready" for port in kept.ports))
        kept.broken.touch()
        os.kill(kept.started[kept.ports[1]][0].pid, signal.SIGTERM)
    assert re.fullmatch(
        r"the vLLM server on port \d+ exited with code 3 before it was ready; last lines of .*\.log:\n  no memory is left",
        kept.ended(),
    )


def test_a_keeper_that_was_stopped_itself_does_not_take_the_servers_for_silent() -> None:
    """As with Ctrl-Z: the clock went on, but nobody was waiting for an answer."""
    one = keeper._Kept("url", None, None, None, None, RolloutConfig(timeout_s=100))  # type: ignore[arg-type]
    one._hear(True, time.monotonic())
    one._hear(False, time.monotonic() + 3600)
    assert one._silent_s == keeper.ANSWER_WAIT_S
    one._hear(True, time.monotonic())
    assert one._silent_s == 0


def test_restarts_are_counted_over_the_last_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(restarts.time, "monotonic", lambda: now)
    limit = RestartLimit(2)
    assert [limit.take(), limit.take(), limit.take()] == [1, 2, None]
    now += restarts.WINDOW_S + 1
    assert [limit.take(), limit.take(), limit.take()] == [1, 2, None]
    assert RestartLimit(0).take() is None


def test_a_server_whose_guardian_was_killed_is_ended_all_the_same(tmp_path: Path) -> None:
    port = free_port()

    class Guarded(ServerProcess):
        def __init__(self) -> None:
            self._mark, self._sockets = f"{process.MARK_VARIABLE}=one", str(tmp_path / "sockets")
            command = [sys.executable, "-m", "tests.unit.stand_in_server", str(port), str(tmp_path / "broken")]
            environment = {**os.environ, process.MARK_VARIABLE: "one", process.SOCKETS_VARIABLE: self._sockets}
            ModuleProcess.__init__(
                self, process.__name__, [str(os.getpid()), *command], env=environment, log_file=tmp_path / "log"
            )

    server = Guarded()
    guardian, deadline = psutil.Process(server.pid), time.monotonic() + LIMIT_S
    while not (left := guardian.children()) or socket.socket().connect_ex(("127.0.0.1", port)):
        assert time.monotonic() < deadline and server.alive
        time.sleep(0.05)
    guardian.kill()
    while server.alive:  # psutil's wait would take its status away
        time.sleep(0.05)
    assert left[0].is_running()
    server.end()
    assert psutil.wait_procs(left, timeout=10)[1] == []
