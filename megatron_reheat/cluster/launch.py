"""torchrun with one clear error, the ranks' exit status and the notice to stop.

`launch_here` starts all ranks on this machine. `python -m megatron_reheat.cluster.launch` takes torchrun's arguments and is
one node's share of a run on several: plain torchrun would die of SIGUSR1 and turn every exit status into 1.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from megatron_reheat.errors import print_error
from megatron_reheat.processes import die_with_parent
from megatron_reheat.stop_request import REQUEUE_EXIT_CODE, STOP_SIGNAL, pass_on_stop_signal

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

_LAUNCHER_PID = "REHEAT_LAUNCHER_PID"
RUN_ID_PREFIX = "reheat-"
STOPPED = "stopped by {}; the same command goes on from the latest checkpoint"
# Nodes notice the end of their ranks within torchrun's monitoring interval (0.1 s) of each other. The first to notice stays
# this much longer: leaving at once, it would take the rendezvous away from nodes that are about to notice.
SETTLE_S = 5.0


def is_launched() -> bool:
    """Whether this process is a rank that this module started."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(RUN_ID_PREFIX)


def end_with_launcher() -> None:
    """For a rank. torchrun's workers are sessions of their own: a launcher that is killed would leave them training."""
    die_with_parent(int(os.environ[_LAUNCHER_PID]), "launcher")


def launch_here(num_processes: int, arguments: Sequence[str]) -> int:
    """Runs `reheat ARGUMENTS` on `num_processes` ranks of this machine; returns the exit status."""
    pass_on_stop_signal()
    from torch.distributed.launcher.api import LaunchConfig

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=RUN_ID_PREFIX + uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        monitor_interval=0.2,
        max_restarts=0,  # a restart would only meet the same error; engines are restarted by `Policy`
    )
    return _launch(config, sys.executable, ["-m", "megatron_reheat", *arguments])


def main(torchrun_arguments: Sequence[str] | None = None) -> int:
    """One node's share. SIGTERM asks the ranks to save and end too: what ends a job slowly may end it in order."""
    pass_on_stop_signal()
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), STOP_SIGNAL))
    from torch.distributed import run as torchrun

    parsed = torchrun.parse_args(torchrun_arguments)
    parsed.rdzv_id = RUN_ID_PREFIX + parsed.rdzv_id
    parsed.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"
    if node := os.environ.get("SLURM_NODEID"):
        # else torchrun compares names and addresses, and finds no host where a node's name leads to another network card
        parsed.rdzv_conf = ",".join(filter(None, (parsed.rdzv_conf, f"is_host={node == '0'}")))
    config, command, arguments = torchrun.config_from_args(parsed)
    return _launch(config, command, arguments, settle_s=SETTLE_S)


def _launch(
    config: LaunchConfig, command: Callable[..., Any] | str, arguments: Sequence[str], *, settle_s: float = 0.0
) -> int:
    """The first failing rank's error is printed in place of torchrun's report."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[_LAUNCHER_PID] = str(os.getpid())
    try:
        elastic_launch(config, command)(*arguments)
    except ChildFailedError as failed:
        if any(failure.exitcode == REQUEUE_EXIT_CODE for failure in failed.failures.values()):
            # all is saved. The first node to leave has srun end the others, and Python drops handlers before it exits.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(settle_s)  # in here: the error holds the rendezvous, which the other nodes still ask
            return REQUEUE_EXIT_CODE
        rank, failure = failed.get_first_failure()
        has_report = failure.error_file_data.get("message") == failure.message
        if has_report or failure.exitcode < 0:  # else it is a bug, and the rank has printed its traceback
            print_error(failure.message if has_report else f"rank {rank} ended: {failure.message}")
        return 1
    except SignalException as signalled:
        print_error(STOPPED.format(signalled.sigval.name))
        return 128 + signalled.sigval
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
