"""A vLLM server of our own on this machine: `vllm serve` with what training needs switched on, and an end in order.

Run as a module it is the server's guardian: vLLM's API process leaves its engine processes behind when it is killed, so
the guardian holds them all in one process group and ends the group when it is asked to, or when its own parent ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_reheat.confidential import TOKEN_VARIABLE
from megatron_reheat.config import RolloutConfig
from megatron_reheat.errors import EngineDied
from megatron_reheat.processes import await_signals, die_with_parent
from megatron_reheat.rollout.engine_options import command_line, engine_environment, engine_options
from megatron_reheat.rollout.module_process import ModuleProcess
from megatron_reheat.rollout.server.guard import END_STATUS
from megatron_reheat.rollout.server.vllm_plugin import GLOO_BACKEND

if TYPE_CHECKING:  # a guardian starts without torch
    from transformers import PretrainedConfig

NCCL_BACKEND = "nccl"  # vLLM's own

# vLLM's own shutdown removes its shared-memory segments, so it is given the time
STOP_GRACE_S = 10.0
SERVED_MODEL_NAME = "policy"
# vLLM's server does not tell the shape of what it serves, but repeats what it was given
SHAPE_KEY = "reheat_policy"
GUARDS = "megatron_reheat.rollout.server.guard"
MARK_VARIABLE = "REHEAT_SERVER_MARK"  # of a server's environment, by which it is found where its guardian was killed
SHARED_MEMORY = Path("/dev/shm")
LOOK_S = 1.0
SOCKETS_VARIABLE = "VLLM_RPC_BASE_PATH"  # where vLLM's processes meet; it leaves its sockets there when it is killed


class ServerProcess(ModuleProcess):
    """Starts at once; whoever talks to it finds out when it is ready.

    Args:
        gpus: the devices vLLM may use, as CUDA_VISIBLE_DEVICES names them; empty on CPU.
        threads: OpenMP threads of a CPU engine.
        host: interface to listen on.
        token: every route asks for it; None where they ask for nothing.
    """

    _process: subprocess.Popen[bytes]

    def __init__(
        self,
        model_path: str,
        hf: PretrainedConfig,
        config: RolloutConfig,
        *,
        dtype: str,
        seed: int,
        port: int,
        log_file: Path,
        token: str | None,
        host: str = "127.0.0.1",
        gpus: Sequence[int | str] = (),
        threads: int = 1,
    ) -> None:
        self.port = port
        command = server_command(
            model_path,
            hf,
            config,
            dtype=dtype,
            seed=seed,
            host=host,
            port=port,
            on_cpu=not gpus,
            guard="EndRoute" if token is None else "TokenGuard",
        )
        self._mark = f"{MARK_VARIABLE}={uuid.uuid4().hex}"
        self._sockets = tempfile.mkdtemp(prefix="vllm-")
        environment = engine_environment() | {
            "VLLM_SERVER_DEV_MODE": "1",  # the weight routes exist only with it
            MARK_VARIABLE: self._mark.partition("=")[2],
            SOCKETS_VARIABLE: self._sockets,
        }
        if token is not None:
            environment[TOKEN_VARIABLE] = token  # a command line is for everybody on the machine to read
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        else:
            environment["OMP_NUM_THREADS"] = str(threads)
            if config.enforce_eager:
                environment["TORCHDYNAMO_DISABLE"] = "1"
        super().__init__(__name__, [str(os.getpid()), *command], env=environment, log_file=log_file)

    @property
    def fate(self) -> str:
        """How it ended by itself, or that it did not come up."""
        code = self._process.poll()
        if code is None:
            return "did not become ready"
        if code < 0 or code > 128:
            return f"was killed by signal {-code if code < 0 else code - 128}"
        return f"exited with code {code}" + (", which its trainer asked for" if code == END_STATUS else "")

    def death(self, how: str | None = None) -> EngineDied:
        """What to say of it, with the end of its log; `how` is its fate."""
        return EngineDied(f"the vLLM server on port {self.port} {how or self.fate}{self._log_tail()}")

    def ask_to_end(self) -> None:
        """By SIGTERM to the guardian; returns at once."""
        if self.alive:
            self._process.terminate()

    def end(self) -> None:
        """Ends the server and everything it started; safe to call twice."""
        self.ask_to_end()
        try:
            self._process.wait(6 * STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            self.kill()
        if self._process.returncode < 0:  # the guardian was killed, and could end nothing
            _end_marked(self._mark)
            shutil.rmtree(self._sockets, ignore_errors=True)


def server_command(
    model_path: str,
    hf: PretrainedConfig,
    config: RolloutConfig,
    *,
    dtype: str,
    seed: int,
    host: str,
    port: int,
    on_cpu: bool,
    guard: str,
) -> list[str]:
    """How vLLM's server is started; also what a server that somebody else starts needs, but for the guard."""
    options: dict[str, Any] = engine_options(config, model_path, dtype=dtype, seed=seed, on_cpu=on_cpu)
    options |= {
        "host": host,
        "port": port,
        "served_model_name": SERVED_MODEL_NAME,
        "enable_scale_out": True,  # /inference/v1/generate: token ids in, token ids and log-probabilities out
        "weight_transfer_config": {"backend": transfer_backend(on_cpu)},
        "additional_config": {SHAPE_KEY: policy_shape(hf)},
        "disable_access_log_for_endpoints": "/weight_info",  # it is asked every few seconds
        "middleware": f"{GUARDS}.{guard}",
    }
    return [sys.executable, "-m", "megatron_reheat.rollout.server.api", *command_line(options)]


def transfer_backend(on_cpu: bool) -> str:
    """The name of vLLM's weight transfer between such devices."""
    return GLOO_BACKEND if on_cpu else NCCL_BACKEND


def policy_shape(hf: PretrainedConfig) -> dict[str, int]:
    """What tells one model of a family from another."""
    return {key: getattr(hf, key) for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}


def _guard(parent_pid: int, command: Sequence[str]) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    die_with_parent(parent_pid, "trainer", signal.SIGTERM)
    server = subprocess.Popen(
        command,
        start_new_session=True,
        # it ends in order by that signal, whether or not somebody up there holds it
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM}),
    )
    segments: set[Path] = set()
    looked = 0.0
    while server.poll() is None and await_signals(parent_pid, timeout_s=0.1) is None:
        if time.monotonic() - looked > LOOK_S:
            looked = time.monotonic()
            segments |= _shared_memory(server.pid)
    segments |= _shared_memory(server.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(STOP_GRACE_S)
    # what vLLM started may outlive it; the group is gone when this fails
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    code = server.wait()
    shutil.rmtree(os.environ[SOCKETS_VARIABLE], ignore_errors=True)
    # a process that was killed could not remove its own, which would stay until the machine starts again
    for segment in segments:
        segment.unlink(missing_ok=True)
    return code if code >= 0 else 128 - code


def _end_marked(mark: str) -> None:
    """Kills the sessions of the processes with this in their environment, and removes what they had in shared memory."""
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if mark.encode() in Path("/proc", pid, "environ").read_bytes().split(b"\0"):
                segments = _shared_memory(session := os.getsid(int(pid)))
                os.killpg(session, signal.SIGKILL)
                for segment in segments:
                    segment.unlink(missing_ok=True)


def _shared_memory(session: int) -> set[Path]:
    """The named segments that processes of the session have mapped."""
    found = set()
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if os.getsid(int(pid)) == session:
                lines = Path("/proc", pid, "maps").read_text().splitlines()
                found |= {
                    Path(line.partition("/")[1] + line.partition("/")[2]) for line in lines if "/dev/shm/" in line
                }
    return {path for path in found if path.parent == SHARED_MEMORY and not path.name.endswith("(deleted)")}


if __name__ == "__main__":
    sys.exit(_guard(int(sys.argv[1]), sys.argv[2:]))
