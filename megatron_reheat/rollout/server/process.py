"""A vLLM server of our own on this machine: `vllm serve` with what training needs switched on, and an end in order.

Run as a module it is the server's guardian: vLLM's API process leaves its engine processes behind when it is killed, so
the guardian holds them all in one process group and ends the group when it is asked to, or when its own parent ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from megatron_reheat.config import RolloutConfig
from megatron_reheat.errors import EngineDied
from megatron_reheat.processes import die_with_parent
from megatron_reheat.rollout.child_process import PACKAGE_ROOT
from megatron_reheat.rollout.engine_options import command_line, engine_environment, engine_options
from megatron_reheat.rollout.log_tail import log_tail
from megatron_reheat.rollout.server.sender import NCCL_BACKEND
from megatron_reheat.rollout.server.vllm_plugin import GLOO_BACKEND

# vLLM's own shutdown removes its shared-memory segments, so it is given the time
STOP_GRACE_S = 10.0
SERVED_MODEL_NAME = "policy"
# vLLM's server does not tell the shape of what it serves, but repeats what it was given
SHAPE_KEY = "reheat_policy"


class ServerProcess:
    """Starts at once; whoever talks to it finds out when it is ready.

    Args:
        gpus: the devices vLLM may use, as CUDA_VISIBLE_DEVICES names them; empty on CPU.
        threads: OpenMP threads of a CPU engine.
        host: interface to listen on. The weight routes ask for no password: keep it private.
    """

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
        host: str = "127.0.0.1",
        gpus: Sequence[int | str] = (),
        threads: int = 1,
    ) -> None:
        self.port = port
        self._log_file = log_file
        command = server_command(model_path, hf, config, dtype=dtype, seed=seed, host=host, port=port, on_cpu=not gpus)
        environment = engine_environment() | {
            "VLLM_SERVER_DEV_MODE": "1",  # the weight routes exist only with it
            "PYTHONPATH": os.pathsep.join(filter(None, (str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")))),
        }
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        else:
            environment["OMP_NUM_THREADS"] = str(threads)
            if config.enforce_eager:
                environment["TORCHDYNAMO_DISABLE"] = "1"
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(os.getpid()), *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the trainer, which then ends this process in order
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def death(self) -> EngineDied:
        """What to say of a server that ended by itself, or did not come up."""
        code = self._process.poll()
        how = "did not become ready" if code is None else f"exited with code {code}"
        return EngineDied(f"the vLLM server on port {self.port} {how}{log_tail(self._log_file, self._log_start)}")

    def ask_to_end(self) -> None:
        if self.alive:
            self._process.terminate()

    def end(self) -> None:
        """Ends the server and everything it started; safe to call twice."""
        self.ask_to_end()
        try:
            self._process.wait(6 * STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


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
) -> list[str]:
    """How vLLM's server is started; also what a server that somebody else starts needs."""
    options: dict[str, Any] = engine_options(config, model_path, dtype=dtype, seed=seed, on_cpu=on_cpu)
    options |= {
        "host": host,
        "port": port,
        "served_model_name": SERVED_MODEL_NAME,
        "enable_scale_out": True,  # /inference/v1/generate: token ids in, token ids and log-probabilities out
        "weight_transfer_config": {"backend": transfer_backend(on_cpu)},
        "additional_config": {SHAPE_KEY: policy_shape(hf)},
    }
    # not the `vllm` command: it looks for a package of that name, which a CPU build does not have
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *command_line(options)]


def transfer_backend(on_cpu: bool) -> str:
    """The name of vLLM's weight transfer between such devices."""
    return GLOO_BACKEND if on_cpu else NCCL_BACKEND


def policy_shape(hf: PretrainedConfig) -> dict[str, int]:
    """What tells one model of a family from another."""
    return {key: getattr(hf, key) for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}


def _guard(parent_pid: int, command: Sequence[str]) -> int:
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True

    signal.signal(signal.SIGTERM, ask)
    die_with_parent(parent_pid, "trainer", signal.SIGTERM)
    server = subprocess.Popen(command, start_new_session=True)
    while not asked and server.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(STOP_GRACE_S)
    # what vLLM started may outlive it; the group is gone when this fails
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    code = server.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(_guard(int(sys.argv[1]), sys.argv[2:]))
