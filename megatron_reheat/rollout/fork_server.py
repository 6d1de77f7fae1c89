"""One interpreter that has imported vLLM and forks the engine processes of a machine: those of all ranks, and later ones.

A launcher that forks its ranks starts it before anything else. The ranks share its socket, of which each message is one
request and carries four open files: the engine's socket, its log, where to answer, and the rank that it ends with. The answer
is the engine's process, and once that has ended how.
"""

from __future__ import annotations

import gc
import importlib
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import IO, Self

from megatron_reheat.large_imports import large_imports
from megatron_reheat.processes import die_with_parent
from megatron_reheat.rollout.engine_options import engine_environment
from megatron_reheat.rollout.engine_process import import_vllm, leave_sigterm_to_children, run_engine
from megatron_reheat.rollout.module_process import ModuleProcess

SERVER_MODULE = "megatron_reheat.rollout.fork_server"
_REQUEST = b"engine"
_NUMBER = struct.Struct("i")  # a process id, then a wait status


class ForkServer(ModuleProcess):
    """The server as its launcher and the ranks see it. A context manager for the launcher, which ends it, and what is left of
    its engines with it.

    `variables` are those of every engine's environment, beside `engine_environment`: vLLM and torch read some of them when
    they are imported.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.variables = dict(variables)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            fd = theirs.fileno()
            arguments, env = [str(fd), str(os.getpid())], engine_environment() | self.variables
            super().__init__(SERVER_MODULE, arguments, env=env, log_file=None, pass_fds=(fd,))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._socket.close()

    def fork(self, engine_socket: int, log: IO[bytes]) -> ForkedProcess:
        """An engine process that speaks over `engine_socket` and prints to `log`; it ends with the calling process.

        Raises:
            OSError: the server is gone.
        """
        ours, theirs = socket.socketpair()
        rank = os.pidfd_open(os.getpid())
        try:
            socket.send_fds(self._socket, [_REQUEST], [engine_socket, log.fileno(), theirs.fileno(), rank])
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(rank)
        return ForkedProcess(ours)


class ForkedProcess:
    """What `subprocess.Popen` is of a child, for a child of the server. Until it is forked there is nothing to kill."""

    def __init__(self, answers: socket.socket) -> None:
        self._answers = answers
        self._pid: int | None = None
        self._pidfd: int | None = None
        self._returncode: int | None = None

    @property
    def pid(self) -> int:
        """Waits for the server to fork it; 0 if it did not."""
        if self._pid is None and self._returncode is None:
            self._take_answer(None)
        return self._pid or 0

    def poll(self) -> int | None:
        """Its exit status, negative for a signal, as far as it has ended."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self._returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired after `timeout` seconds."""
        while self._returncode is None:
            self._take_answer(timeout)
        return self._returncode

    def kill(self) -> None:
        if self.poll() is not None:
            return
        if self._pidfd is None:  # not forked yet, perhaps by a server that is stuck
            self._end(-signal.SIGKILL)  # it will find its socket closed
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _take_answer(self, timeout: float | None) -> None:
        self._answers.settimeout(timeout)
        try:
            message, fds, _, _ = socket.recv_fds(self._answers, _NUMBER.size, 1)
        except (TimeoutError, BlockingIOError):
            raise subprocess.TimeoutExpired("engine", timeout or 0) from None
        except OSError:
            message, fds = b"", []
        if not message:
            self._end(-signal.SIGKILL)  # with the server, of which it is a child
        elif fds:
            (self._pid,), (self._pidfd,) = _NUMBER.unpack(message), fds
        else:
            self._end(os.waitstatus_to_exitcode(*_NUMBER.unpack(message)))

    def _end(self, returncode: int) -> None:
        self._returncode = returncode
        self._answers.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None


# -- in the server -------------------------------------------------------------------------------------------------------


def main() -> int:
    """Forks until the launcher ends it, or is gone with all ranks; returns the exit code. In an engine, that of the engine."""
    requests, launcher_pid = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    die_with_parent(launcher_pid, "launcher")
    leave_sigterm_to_children()
    import_engine()
    gc.freeze()  # a collection in an engine would write to every page that it shares with the others
    selector = selectors.DefaultSelector()
    selector.register(requests, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is not requests:
                selector.unregister(key.fileobj)
                _report_end(key.fd, *key.data)
                continue
            message, fds, _, _ = socket.recv_fds(requests, len(_REQUEST), 4)
            if not message:
                return 0
            engine, log, answers, rank = fds
            if not (pid := os.fork()):
                for other in selector.get_map().values():
                    os.close(other.fd)
                return _be_engine(engine, log, rank)
            pidfd = os.pidfd_open(pid)
            for fd in (engine, log, rank):
                os.close(fd)
            told = socket.socket(fileno=answers)
            with suppress(OSError):  # a rank that is gone takes its engine with it
                socket.send_fds(told, [_NUMBER.pack(pid)], [pidfd])
            selector.register(pidfd, selectors.EVENT_READ, (pid, told))


def import_engine() -> None:
    """vLLM, and half of what an engine on a CPU else imports only when it is made."""
    import_vllm()
    with suppress(ImportError), large_imports():  # not a part of vLLM's interface
        importlib.import_module("vllm.v1.worker.cpu_worker")


def _report_end(pidfd: int, pid: int, told: socket.socket) -> None:
    _, status = os.waitpid(pid, 0)
    with told, suppress(OSError):
        told.send(_NUMBER.pack(status))
    os.close(pidfd)


def _be_engine(engine: int, log: int, rank: int) -> int:
    os.setsid()
    die_with_parent(os.getppid(), "fork server")
    threading.Thread(target=_end_with, args=(rank,), daemon=True).start()
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(log, os.pread(sys.stdout.fileno(), os.fstat(sys.stdout.fileno()).st_size, 0))
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    os.close(log)
    print("vLLM was imported before the run asked for an engine", flush=True)
    return run_engine(Connection(engine))


def _end_with(rank: int) -> None:
    """A death signal would come with the server's end, not with the rank's."""
    waiting = selectors.DefaultSelector()
    waiting.register(rank, selectors.EVENT_READ)
    waiting.select()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    try:
        exit_code = main()
    except Exception:
        traceback.print_exc()
        exit_code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # vLLM's and gloo's threads need no unwinding
