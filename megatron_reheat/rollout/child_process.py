"""A child interpreter with a socket to it, where every wait ends: with an answer, a death notice, or a kill."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from megatron_reheat.errors import EngineDied
from megatron_reheat.rollout.module_process import ModuleProcess, Process

EXIT_GRACE_S = 5.0


@dataclass(frozen=True)
class Part:
    """Some of an answer, ahead of the rest."""

    value: Any


class ChildProcess(ModuleProcess):
    """Runs `python -m MODULE SOCKET_FD PARENT_PID ...`, output to `log_file`. One caller, one request at a time.

    `fork` makes the process in another way: it gets the child's end of the socket and the log.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str],
        log_file: Path | None,
        fork: Callable[[int, IO[bytes]], Process] | None = None,
    ) -> None:
        self._next_id = 0
        ours, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            first = [str(fd), str(os.getpid())]
            super().__init__(
                module,
                [*first, *arguments],
                env=env,
                log_file=log_file,
                pass_fds=(fd,),
                fork=None if fork is None else partial(fork, fd),
            )
        self._socket = ours
        self._connection = Connection(os.dup(ours.fileno()))

    def send(self, operation: str, *arguments: Any, timeout_s: float) -> int:
        """Sends without waiting for an answer; returns the request's id.

        Raises:
            EngineDied: when the process is gone, or has not taken the request within `timeout_s`.
        """
        self._next_id += 1
        self._send_object((self._next_id, operation, arguments), operation, timeout_s)
        return self._next_id

    def send_settings(self, settings: Any, timeout_s: float) -> None:
        """The first message, without an id: the child answers it as it would request 0. Raises as `send`."""
        self._send_object(settings, "start", timeout_s)

    def call(
        self,
        operation: str,
        *arguments: Any,
        timeout_s: float,
        timeout_key: str,
        take: Callable[[Any], None] | None = None,
    ) -> Any:
        """Sends a request and waits for its answer; `take` is called with each part that comes before.

        Raises:
            EngineDied: when the process is gone, or has not answered within `timeout_s`, the value of `timeout_key`.
            ReheatError: what the process answered with.
        """
        request_id = self.send(operation, *arguments, timeout_s=timeout_s)
        return self.receive(request_id, operation, timeout_s=timeout_s, timeout_key=timeout_key, take=take)

    def receive(
        self,
        request_id: int,
        operation: str,
        *,
        timeout_s: float,
        timeout_key: str,
        take: Callable[[Any], None] | None = None,
    ) -> Any:
        """Waits for the answer to one request; answers to earlier, interrupted requests are dropped."""
        give_up = time.monotonic() + timeout_s
        while True:
            try:
                if not self._connection.poll(max(0.0, give_up - time.monotonic())):
                    raise BlockingIOError
                self._set_timeout(socket.SO_RCVTIMEO, timeout_s)
                answered_id, answer = self._connection.recv()
            except BlockingIOError:
                raise self._stuck(operation, timeout_s, timeout_key) from None
            except (EOFError, OSError):
                raise self._died(operation) from None
            if answered_id == request_id and not isinstance(answer, Part):
                break
            if answered_id == request_id and take is not None:
                take(answer.value)
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
