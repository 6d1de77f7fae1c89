"""Engine processes that import vLLM while their trainer still imports torch and Megatron and reads data.

They are started from what the environment says alone. Whoever starts an engine later works out arguments and variables from
all that is known then, and takes such a process if they are the same, else another one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_reheat.config import Config
from megatron_reheat.rollout.child_process import ChildProcess
from megatron_reheat.rollout.engine_options import engine_environment, worker_variables
from megatron_reheat.rollout.fork_server import ForkServer
from megatron_reheat.run_folder import RunFolder

DEVICES = Path("/dev")
WORKER_MODULE = "megatron_reheat.rollout.engine_process"


class HeadStart:
    """A context manager around a rank's whole run, inside which `take` may be called; what nobody took is ended at its end.

    With the machine's `fork_server` it gives as many processes as are asked for. Else it is one process, and none for a rank
    that will hold no engine, or a run that has no steps left; nor where it cannot be.
    """

    def __init__(self, config: Config, world_size: int, fork_server: ForkServer | None = None) -> None:
        self._config, self._world_size, self._fork_server = config, world_size, fork_server
        self._variables: dict[str, str] = {}
        self._child: ChildProcess | None = None

    def __enter__(self) -> Self:
        if self._fork_server is None and self._holds_engine() and not _is_finished(self._config):
            self._variables = _expected_variables(self._config)
            env = engine_environment() | self._variables
            with suppress(OSError):  # what is wrong is said where the engine is started
                self._child = ChildProcess(WORKER_MODULE, [], env=env, log_file=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._child is not None:
            _give_up(self._child)
            self._child = None

    def take(self, arguments: Sequence[str], variables: Mapping[str, str], log_file: Path) -> ChildProcess | None:
        """A process that has vLLM or is importing it, if there is one like that; it goes on in `log_file`."""
        if self._fork_server is not None and not arguments and variables == self._fork_server.variables:
            with suppress(OSError):
                return ChildProcess(WORKER_MODULE, [], env={}, log_file=log_file, fork=self._fork_server.fork)
        child, self._child = self._child, None
        if child is None:
            return None
        if arguments or variables != self._variables or not child.alive:
            _give_up(child)
            return None
        child.log_to(log_file)
        return child

    def _holds_engine(self) -> bool:
        """As `engine_seats` has it, of Megatron's order of ranks: tensor, then context, data, pipeline."""
        rank, parallel, rollout = int(os.environ.get("RANK", "0")), self._config.parallel, self._config.rollout
        if rollout.mode == "server":
            return False
        if rollout.mode == "colocated":
            return rank % rollout.tensor == 0
        return rank % parallel.tensor == 0 and rank < self._world_size // parallel.pipeline


def start_fork_server(config: Config, local_ranks: int) -> ForkServer | None:
    """For the launcher of a machine's ranks, as early as possible. None where no rank will want an engine, on GPUs, whose
    engines differ in what their environment must say before vLLM is imported, and where it cannot be started."""
    if has_gpus() or config.rollout.mode == "server" or _is_finished(config):
        return None
    with suppress(OSError):  # what is wrong is said where an engine is started
        return ForkServer(_expected_variables(config, local_ranks))
    return None


def has_gpus() -> bool:
    """As far as can be seen without torch."""
    return any(DEVICES.glob("nvidia[0-9]*"))  # a container that is given some of a machine's has these numbers


def _is_finished(config: Config) -> bool:
    with suppress(OSError):  # a folder that cannot be read is refused by the run itself
        saved = RunFolder(config.run.path).saved_step
        return saved is not None and saved >= config.total_steps
    return False


def _expected_variables(config: Config, local_ranks: int | None = None) -> dict[str, str]:
    """Without `local_ranks`, of the rank that this process is."""
    parallel, rollout = config.parallel, config.rollout
    ranks_per_engine = rollout.tensor if rollout.mode == "colocated" else parallel.tensor * parallel.pipeline
    local_ranks = local_ranks or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    first = int(os.environ.get("LOCAL_RANK", "0"))
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in named.split(",")] if named else list(map(str, range(first + rollout.tensor)))
    gpus = names[first : first + rollout.tensor] if has_gpus() else []
    cores = len(os.sched_getaffinity(0))
    return worker_variables(rollout, max(1, local_ranks // ranks_per_engine), cores, gpus)


def _give_up(child: ChildProcess) -> None:
    """It waits for its first message, which an `exit` is not."""
    child.kill()
    child.end()
