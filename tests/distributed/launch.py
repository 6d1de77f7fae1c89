"""Runs a case of `tests.distributed.cases` in several real processes over gloo and brings every rank's result back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_reheat.ports import free_port

ROOT = Path(__file__).resolve().parents[2]


def launch(case: str, world_size: int, tmp_path: Path, *, timeout_s: float = 480.0, **arguments: Any) -> list[Any]:
    """`cases.<case>(**arguments)` on `world_size` ranks; results in rank order.

    A rank that fails ends the others, and its output is shown.
    """
    folder = tmp_path / f"{case}-{world_size}"
    folder.mkdir()
    torch.save(arguments, folder / "arguments.pt")
    environment = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    processes = []
    for rank in range(world_size):
        with (folder / f"log-{rank}.txt").open("wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-W", "ignore", "-m", "tests.distributed.run_case", case, str(folder)],
                    cwd=ROOT,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        failed = _wait(processes, timeout_s)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    if failed is not None:
        output = (folder / f"log-{failed}.txt").read_text()[-4000:]
        raise AssertionError(f"{case}: rank {failed} of {world_size} exited {processes[failed].returncode}\n{output}")
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world_size)]


def _wait(processes: list[subprocess.Popen], timeout_s: float) -> int | None:
    """The first rank seen to fail, or None when all have ended well."""
    waited = 0.0
    while waited < timeout_s:
        codes = [p.poll() for p in processes]
        for rank, code in enumerate(codes):
            if code:
                return rank
        if all(code == 0 for code in codes):
            return None
        try:
            processes[codes.index(None)].wait(0.2)
        except subprocess.TimeoutExpired:
            waited += 0.2
    return [p.poll() for p in processes].index(None)
