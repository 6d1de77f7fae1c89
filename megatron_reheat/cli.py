"""The command line: `reheat train CONFIG [key=value ...]`, `reheat report RUN ...`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_reheat.config import Config, load_config
from megatron_reheat.errors import ReheatError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. Errors meant for the user are one line on stderr, without a traceback."""
    parsed = _parser().parse_args(arguments)
    _quiet_libraries()
    try:
        return parsed.run(parsed)
    except ReheatError as error:
        if not (error.on_every_rank and int(os.environ.get("RANK", "0"))):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="reheat", description="Entropy-collapse repair for RL from verifiable rewards")
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
    parallel = config.parallel
    world_size = parallel.tensor * parallel.pipeline * config.data_parallel()
    if "RANK" not in os.environ and world_size > 1:
        return _launch(world_size, ["train", str(parsed.config), *parsed.overrides])
    return _run(config)


def _run(config: Config) -> int:
    from megatron_reheat.stages.run import train

    train(config)
    return 0


def _launch(num_processes: int, arguments: list[str]) -> int:
    """torchrun on this machine; a failing rank has printed its own error, so torchrun's report is left out."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    launch = elastic_launch(
        LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            monitor_interval=0.2,
        ),
        sys.executable,
    )
    try:
        launch("-m", "megatron_reheat", *arguments)
    except ChildFailedError:
        return 1
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
