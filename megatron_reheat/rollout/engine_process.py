"""The engine process: vLLM in one interpreter of its own, driven over an inherited socket.

Started by `EmbeddedEngine` as `worker SOCKET_FD PARENT_PID [CORE,CORE...]`, or forked by `fork_server`. Requests are
`(id, operation, arguments)`; each is answered by `(id, result or exception)` except `load`, which the trainer streams
without waiting: what goes wrong in one is raised by the next operation of that sync which is answered. `generate` may send
`(id, Part)` before, for what is finished already.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_reheat.large_imports import large_imports
from megatron_reheat.processes import die_with_parent, name_process
from megatron_reheat.rollout.child_process import Part

if TYPE_CHECKING:
    from megatron_reheat.rollout.vllm_sampler import VLLMSampler

EXIT_UNREPAIRABLE = 3


def main() -> int:
    """Serves until the trainer says exit or is gone; returns the exit code (EXIT_UNREPAIRABLE: vLLM is of no use)."""
    socket_fd, parent_pid, cores = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    die_with_parent(parent_pid, "trainer")
    leave_sigterm_to_children()
    if cores:
        # before the first import that counts cores and makes threads
        os.sched_setaffinity(0, [int(core) for core in cores[0].split(",")])
    connection = Connection(socket_fd)
    import_vllm()
    return run_engine(connection)


def leave_sigterm_to_children() -> None:
    """The trainer holds SIGTERM, and so did this process from its start; processes of vLLM are ended by it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def import_vllm() -> None:
    """And all else that an engine needs; seconds."""
    with large_imports():
        import megatron_reheat.rollout.vllm_sampler
        import megatron_reheat.rollout.wire  # noqa: F401


def run_engine(connection: Connection) -> int:
    """Makes the engine that the first message describes, and serves; returns the exit code."""
    from megatron_reheat.errors import ReheatError
    from megatron_reheat.rollout.vllm_sampler import VLLMSampler
    from megatron_reheat.rollout.wire import WorkerReady, WorkerSettings

    try:
        settings = connection.recv()
    except EOFError:
        return 0  # the trainer has no use for an engine after all
    assert isinstance(settings, WorkerSettings)
    _print_to(settings.log_file)
    name_process(Path(settings.log_file).stem)
    try:
        sampler = VLLMSampler(settings)
    except ReheatError as error:
        # what the user can act on travels as it is; a death would be answered by a restart that meets the same
        connection.send((0, error))
        return EXIT_UNREPAIRABLE
    connection.send((0, WorkerReady(sampler.vocab_size, sampler.max_model_len, time.monotonic())))
    return _serve(connection, sampler)


def _print_to(log_file: str) -> None:
    """Where it does already, unless this process was started before the run knew; then with what was printed before."""
    sys.stdout.flush()
    sys.stderr.flush()
    before, log = sys.stdout.fileno(), os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    if not os.path.samestat(os.fstat(before), os.fstat(log)):
        os.write(log, os.pread(before, os.fstat(before).st_size, 0))
        os.ftruncate(before, 0)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log, stream.fileno())
        print("vLLM was imported before the run asked for an engine", flush=True)
    os.close(log)


def _serve(connection: Connection, sampler: VLLMSampler) -> int:
    """Answers until the trainer says exit or is gone; returns the exit code."""
    load_error: Exception | None = None
    while True:
        try:
            request_id, operation, arguments = connection.recv()
        except EOFError:
            return 0
        if operation == "exit":
            return 0
        if operation == "begin":
            load_error = None
        if operation == "load":
            load_error = load_error or _load(sampler, arguments)
            continue
        if operation == "generate":
            arguments = (*arguments, partial(_send_part, connection, request_id))
        answer: Any
        try:
            if load_error is not None and operation in ("recycle", "commit"):
                raise load_error
            answer = sampler.operations[operation](*arguments)
        except Exception as error:
            answer = _portable(error)
            # vLLM's layers are left in pieces that it cannot put together again
            unrepairable = operation in ("begin", "recycle", "commit") and answer is not error
            connection.send((request_id, answer))
            if unrepairable:
                return EXIT_UNREPAIRABLE
        else:
            connection.send((request_id, answer))


def _send_part(connection: Connection, request_id: int, value: Any) -> None:
    connection.send((request_id, Part(value)))


def _load(sampler: VLLMSampler, arguments: tuple[Any, ...]) -> Exception | None:
    try:
        sampler.operations["load"](*arguments)
    except Exception as error:
        return error
    return None


def _portable(error: Exception) -> Exception:
    """Our own errors travel as they are; vLLM's may not unpickle where vLLM is not imported."""
    from megatron_reheat.errors import ReheatError

    if isinstance(error, ReheatError):
        return error
    traceback.print_exception(error)
    return ReheatError(f"vLLM raised {type(error).__name__}: {error}")


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # vLLM's and gloo's threads need no unwinding
