"""A child interpreter with a socket to it, where every wait ends: with an answer, a death notice, or a kill."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import megatron_reheat
from megatron_reheat.errors import EngineDied
from megatron_reheat.rollout.log_tail import log_tail

PACKAGE_ROOT = Path(megatron_reheat.__file__).parent.parent
EXIT_GRACE_S = 5.0


class ChildProcess:
    """Runs `python -m MODULE SOCKET_FD PARENT_PID ...`, output to `log_file`. One caller, one request at a time."""

    def __init__(self, module: str, arguments: Sequence[str], *, env: Mapping[str, str], log_file: Path) -> None:
        self._log_file = log_file
        self._next_id = 0
        ours, theirs = socket.socketpair()
        log_file.parent.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(filter(None, (str(PACKAGE_ROOT), env.get("PYTHONPATH"))))
        with theirs, log_file.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), str(os.getpid()), *arguments],
                env={**env, "PYTHONPATH": path},
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the trainer, which then ends this process in order
            )
        self._socket = ours
        self._connection = Connection(os.dup(ours.fileno()))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, operation: str, *arguments: Any, timeout_s: float) -> int:
        """Sends without waiting for an answer; returns the request's id.

        Raises:
            EngineDied: when the process is gone, or has not taken the request within `timeout_s`.
        """
        self._next_id += 1
        self._send_object((self._next_id, operation, arguments), operation, timeout_s)
        return self._next_id

    def send_settings(self, settings: Any, timeout_s: float) -> None:
        self._send_object(settings, "start", timeout_s)

    def call(self, operation: str, *arguments: Any, timeout_s: float, timeout_key: str) -> Any:
        """Sends a request and waits for its answer.

        Raises:
            EngineDied: when the process is gone, or has not answered within `timeout_s`, the value of `timeout_key`.
            ReheatError: what the process answered with.
        """
        request_id = self.send(operation, *arguments, timeout_s=timeout_s)
        return self.receive(request_id, operation, timeout_s=timeout_s, timeout_key=timeout_key)

    def receive(self, request_id: int, operation: str, *, timeout_s: float, timeout_key: str) -> Any:
        """Waits for the answer to one request; answers to earlier, interrupted requests are dropped."""
        while True:
            try:
                if not self._connection.poll(timeout_s):
                    raise BlockingIOError
                self._set_timeout(socket.SO_RCVTIMEO, timeout_s)
                answered_id, answer = self._connection.recv()
            except BlockingIOError:
                raise self._stuck(operation, timeout_s, timeout_key) from None
            except (EOFError, OSError):
                raise self._died(operation) from None
            if answered_id == request_id:
                break
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        """Asks the process to exit and kills it when it does not; safe to call twice."""
        if self.alive:
            try:
                self._set_timeout(socket.SO_SNDTIMEO, EXIT_GRACE_S)
                self._connection.send((0, "exit", ()))
                self._process.wait(EXIT_GRACE_S)
            except (OSError, subprocess.TimeoutExpired):
                self.kill()
        self._connection.close()
        self._socket.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _send_object(self, message: Any, operation: str, timeout_s: float) -> None:
        try:
            self._set_timeout(socket.SO_SNDTIMEO, timeout_s)
            self._connection.send(message)
        except BlockingIOError:
            raise self._stuck(operation, timeout_s, "rollout.timeout_s") from None
        except OSError:
            raise self._died(operation) from None

    def _set_timeout(self, option: int, seconds: float) -> None:
        # poll() only sees a message begin; a process stopped in the middle of one would block us for ever
        whole = int(seconds)
        self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", whole, int((seconds - whole) * 1e6)))

    def _died(self, operation: str) -> EngineDied:
        try:
            code = self._process.wait(EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return EngineDied(f"engine process {self.pid} closed its socket during '{operation}'{self._log_tail()}")
        how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        return EngineDied(f"engine process {self.pid} {how} during '{operation}'{self._log_tail()}")

    def _stuck(self, operation: str, timeout_s: float, timeout_key: str) -> EngineDied:
        self.kill()
        return EngineDied(
            f"engine process {self.pid} did not answer '{operation}' within {timeout_s:g} s ({timeout_key}) and was "
            f"killed; raise {timeout_key} if it was only slow{self._log_tail()}"
        )

    def _log_tail(self) -> str:
        return log_tail(self._log_file, self._log_start)
