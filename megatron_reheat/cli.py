"""The command line: `reheat train CONFIG [key=value ...]`, `reheat report RUN ...`."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import time
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_reheat.config import Config, load_config
from megatron_reheat.errors import ReheatError
from megatron_reheat.processes import die_with_parent

_LAUNCHER_PID = "REHEAT_LAUNCHER_PID"
RUN_ID_PREFIX = "reheat-"
# many times the launcher's monitoring interval
SECONDARY_FAILURE_WAIT_S = 3.0
STOPPED = "stopped by {}; the same command goes on from the latest checkpoint"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. Errors meant for the user are one line on stderr, without a traceback."""
    parsed = _parser().parse_args(arguments)
    _quiet_libraries()
    try:
        return parsed.run(parsed)
    except ReheatError as error:
        _report_error(error)
        return 1
    except KeyboardInterrupt:
        if not _is_launched():
            _print_error(STOPPED.format("SIGINT"))
        return 128 + signal.SIGINT
    except Exception:
        if _is_launched():
            # when another rank failed first, its error counts: the launcher ends this one before the wait is over
            time.sleep(SECONDARY_FAILURE_WAIT_S)
        raise


def _report_error(error: ReheatError) -> None:
    """One line for all ranks: our launcher prints the first rank's; under another torchrun the first rank prints its own.

    torchrun's error file is written in any case, so that an error of a single rank is in torchrun's report.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": str(error), "timestamp": int(time.time())}))
    if not _is_launched() and not (error.on_every_rank and int(os.environ.get("RANK", "0"))):
        _print_error(str(error))


def _print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


def _is_launched() -> bool:
    """Whether this process is a rank that `_launch` started."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(RUN_ID_PREFIX)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reheat", description="Entropy-collapse repair for RL from verifiable rewards"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="run a recipe; starts its own processes unless torchrun already did")
    train.add_argument("config", type=Path)
    train.add_argument("overrides", nargs="*", metavar="key=value")
    train.set_defaults(run=_train)
    report = commands.add_parser("report", help="draw one or more runs")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    report.add_argument("--out", type=Path, help="folder of the report; by default the last run's report/")
    report.set_defaults(run=_report)
    return parser


def _train(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.config, parsed.overrides)
    if "RANK" in os.environ:
        config.data_parallel(int(os.environ.get("WORLD_SIZE", "1")))
        if _is_launched():
            # torchrun's workers are sessions of their own: a launcher that is killed would leave them training
            die_with_parent(int(os.environ[_LAUNCHER_PID]), "launcher")
        return _run(config)
    parallel = config.parallel
    world_size = parallel.tensor * parallel.pipeline * config.data_parallel()
    if world_size > 1:
        return _launch(world_size, ["train", str(parsed.config), *parsed.overrides])
    return _run(config)


def _run(config: Config) -> int:
    from megatron_reheat.stages.run import train

    train(config)
    return 0


def _launch(num_processes: int, arguments: list[str]) -> int:
    """torchrun on this machine, with the first failing rank's error in place of torchrun's report."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[_LAUNCHER_PID] = str(os.getpid())
    launch = elastic_launch(
        LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=RUN_ID_PREFIX + uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            monitor_interval=0.2,
            max_restarts=0,  # a restart would only meet the same error; engines are restarted by `Policy`
        ),
        sys.executable,
    )
    try:
        launch("-m", "megatron_reheat", *arguments)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        has_report = failure.error_file_data.get("message") == failure.message
        if has_report or failure.exitcode < 0:  # else it is a bug, and the rank has printed its traceback
            _print_error(failure.message if has_report else f"rank {rank} ended: {failure.message}")
        return 1
    except SignalException as signalled:
        _print_error(STOPPED.format(signalled.sigval.name))
        return 128 + signalled.sigval
    return 0


def _report(parsed: argparse.Namespace) -> int:
    from megatron_reheat.analysis.report import write_report

    paths = write_report(parsed.runs, parsed.out)
    print(f"report: {paths.html}\npicture: {paths.png}")
    return 0


def _quiet_libraries() -> None:
    """Libraries warn about what they cannot know here (missing Transformer Engine, deprecations of their own)."""
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
