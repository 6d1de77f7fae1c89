"""torchrun with one clear error, the ranks' exit status and the notice to stop.

`launch_here` starts all ranks on this machine, as interpreters of their own or forked from this one.
`python -m megatron_reheat.cluster.launch` takes torchrun's arguments and is one node's share of a run on several: plain
torchrun would die of SIGUSR1 and turn every exit status into 1.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_reheat.errors import RankLost, ReheatError, print_error
from megatron_reheat.processes import die_with_parent, name_process
from megatron_reheat.run_folder import RunFolder
from megatron_reheat.stop_request import (
    FINISHING,
    REQUEUE_EXIT_CODE,
    StopWatch,
    hold_stop_signals,
    how_to_go_on,
    pass_on_stop_signal,
    stopped_by,
)

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

_LAUNCHER_PID = "REHEAT_LAUNCHER_PID"
_RANK_NAME = "rank "
_TORCHRUN_HANDLES = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
RUN_ID_PREFIX = "reheat-"
# Nodes notice the end of their ranks within torchrun's monitoring interval (0.1 s) of each other. The first to notice stays
# this much longer: leaving at once, it would take the rendezvous away from nodes that are about to notice.
SETTLE_S = 5.0
KILL_WAIT_S = 5.0
# A rank that somebody stopped (SIGSTOP) would keep the others waiting until a collective's own time is over.
STOPPED_LIMIT_S = 60
LOOK_EVERY_S = 1.0
SECONDARY_FAILURE_WAIT_S = 3.0  # many times the monitoring interval


def is_launched() -> bool:
    """Whether this process is a rank that this module started."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(RUN_ID_PREFIX)


def become_rank() -> None:
    """Gives this process its rank's name, and torchrun's end: its workers are sessions of their own, and a launcher that is
    killed would leave them training."""
    name_process(_RANK_NAME + os.environ["RANK"])
    if is_launched():
        die_with_parent(int(os.environ[_LAUNCHER_PID]), "launcher")
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(os.getppid(), "launcher")


def is_launchers_own(sender: int) -> bool:
    """For a rank: whether the process that sent SIGTERM is its launcher, which so ends the other ranks when one has failed.

    Another torchrun passes on a SIGTERM of its own in the same way; what tells the two apart is whether all ranks of the node
    are there.
    """
    if is_launched():
        return sender == int(os.environ[_LAUNCHER_PID])
    if sender != os.getppid() or "LOCAL_WORLD_SIZE" not in os.environ:
        return False
    import psutil

    alive = 0
    with contextlib.suppress(psutil.Error):  # torchrun itself is gone
        for child in psutil.Process(sender).children():
            with contextlib.suppress(psutil.Error):  # ended while it was looked at
                alive += child.status() != psutil.STATUS_ZOMBIE
    return alive < int(os.environ["LOCAL_WORLD_SIZE"])


def reporting_errors(run: Callable[[], int]) -> int:
    """Its exit status, in the process that the user started or in a rank. An error of ours becomes one line on stderr."""
    try:
        return run()
    except ReheatError as error:
        if isinstance(error, RankLost):
            _wait_for_the_first_error()
        _report_error(error)
        return 1
    except KeyboardInterrupt:
        print_error("stopped by SIGINT")
        return 128 + signal.SIGINT
    except Exception:
        _wait_for_the_first_error()
        raise


def _wait_for_the_first_error() -> None:
    """When another rank failed first, its error counts: the launcher ends this one before the wait is over."""
    if is_launched():
        time.sleep(SECONDARY_FAILURE_WAIT_S)


def _report_error(error: ReheatError) -> None:
    """One line for all ranks: our launcher prints the first rank's; under another torchrun the first rank prints its own.

    torchrun's error file is written in any case, so that an error of a single rank is in torchrun's report.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": str(error), "timestamp": int(time.time())}))
    if not is_launched() and not (error.on_every_rank and int(os.environ.get("RANK", "0"))):
        print_error(str(error))


def heed_stop_signals(folder: RunFolder, grace_s: float) -> None:
    """For the launcher of all ranks of a run, which writes to `folder`; `hold_stop_signals` comes before.

    SIGTERM leaves `grace_s` seconds for the step in progress and the save.
    """
    pass_on_stop_signal()
    StopWatch(partial(stopped_by, folder=folder), FINISHING, grace_s, _kill_ranks).start()


def launch_here(num_processes: int, run: Sequence[str] | Callable[[], int], folder: RunFolder) -> int:
    """Runs what writes to `folder` on `num_processes` ranks of this machine; returns the exit status.

    Args:
        run: arguments of `reheat` for ranks that are interpreters of their own; or what each rank calls when it has been
            forked, with all that is imported by then, for its exit status.
    """
    import psutil  # noqa: F401  # not in a thread of this process while a rank is forked, which would wait for it for ever
    from torch.distributed import TCPStore
    from torch.distributed.launcher.api import LaunchConfig

    # The static rendezvous of a single machine shares this store's server, and so its port. torchrun's dynamic one looks
    # through all modules of this process again and again, to name the function that calls it: seconds where Megatron is one.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=RUN_ID_PREFIX + uuid.uuid4().hex,
        rdzv_backend="static",
        rdzv_endpoint=f"{store.host}:{store.port}",
        rdzv_configs={"rank": 0},
        monitor_interval=0.2,
        max_restarts=0,  # a restart would only meet the same error; engines are restarted by `Policy`
        start_method="fork",
    )
    if not callable(run):
        return _launch(config, sys.executable, ["-m", "megatron_reheat", *run], folder)
    handlers = {number: signal.getsignal(number) for number in _TORCHRUN_HANDLES}
    gc.freeze()  # a collection in a rank would write to every page that it shares with the others
    try:
        return _launch(config, _run_forked, [run, handlers], folder)
    finally:
        gc.unfreeze()  # the interpreter's end would find what is frozen leaked


def _run_forked(run: Callable[[], int], handlers: Mapping[signal.Signals, Any]) -> None:
    """In a rank, which is to be as one with an interpreter of its own. `handlers` are those from before torchrun's."""
    os.setsid()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    become_rank()
    try:
        exit_code = run()
    except Exception:  # torch would keep it in a file of its own
        traceback.print_exc()
        exit_code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if exit_code:
        sys.exit(exit_code)


def _kill_ranks() -> None:
    """And the other children. What they have started ends with them."""
    import psutil

    children = psutil.Process().children()
    for child in children:
        child.kill()
    psutil.wait_procs(children, timeout=KILL_WAIT_S)


def main(torchrun_arguments: Sequence[str] | None = None) -> int:
    """One node's share. The grace time after SIGTERM is the scheduler's here: ranks of other nodes count on these."""
    hold_stop_signals()
    pass_on_stop_signal()
    StopWatch(stopped_by, FINISHING, end_others=_kill_ranks).start()
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
    config: LaunchConfig,
    command: Callable[..., Any] | str,
    arguments: Sequence[Any],
    folder: RunFolder | None = None,
    *,
    settle_s: float = 0.0,
) -> int:
    """The first failing rank's error is printed in place of torchrun's report. `folder` is where the run saves, if known."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    # what they say of a failed rank is said here, once
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # torchrun would take them back from nohup, or from a script's `&`
    heard = [name for name in config.signals_to_handle.split(",") if not _is_ignored(name)]
    config.signals_to_handle = ",".join(heard)
    os.environ[_LAUNCHER_PID] = str(os.getpid())
    watch = _RankWatch()
    watch.start()
    try:
        elastic_launch(config, command)(*arguments)
    except ChildFailedError as failed:
        if any(failure.exitcode == REQUEUE_EXIT_CODE for failure in failed.failures.values()):
            # all is saved
            time.sleep(settle_s)  # in here: the error holds the rendezvous, which the other nodes still ask
            return REQUEUE_EXIT_CODE
        rank, failure = failed.get_first_failure()
        if watch.ended:
            print_error(f"{watch.ended}; {how_to_go_on(folder)}")
        elif failure.error_file_data.get("message") == failure.message:
            print_error(failure.message)
        elif failure.exitcode < 0:  # else it is a bug, and the rank has printed its traceback
            print_error(f"rank {rank} ended: {failure.message}; {how_to_go_on(folder)}")
        return 1
    except SignalException as signalled:
        print_error(stopped_by(signalled.sigval.name, folder))
        return 128 + signalled.sigval
    return 0


def _is_ignored(signal_name: str) -> bool:
    return signal.getsignal(signal.Signals[signal_name]) == signal.SIG_IGN


class _RankWatch(threading.Thread):
    """Ends a rank that has been stopped (SIGSTOP) for `STOPPED_LIMIT_S` seconds, and with it the others; `ended` tells why."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ended = ""

    def run(self) -> None:
        import psutil

        looks: dict[
            psutil.Process, int
        ] = {}  # as many in a row: they stop with this process when a whole job is suspended
        while not self.ended:
            time.sleep(LOOK_EVERY_S)
            with contextlib.suppress(psutil.Error):
                ranks = [p for p in psutil.Process().children() if p.name().startswith(_RANK_NAME)]
                stopped = [rank for rank in ranks if rank.status() == psutil.STATUS_STOPPED]
                looks = {rank: looks.get(rank, 0) + 1 for rank in stopped}
                for rank in stopped:
                    if looks[rank] * LOOK_EVERY_S >= STOPPED_LIMIT_S:
                        self.ended = (
                            f"{rank.name()} (process {rank.pid}) had been stopped (SIGSTOP) for {STOPPED_LIMIT_S} s and was "
                            "ended, and the others with it"
                        )
                        rank.kill()


if __name__ == "__main__":
    raise SystemExit(main())
