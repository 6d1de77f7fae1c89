"""Runs a case of `tests.distributed.cases` in several real processes over gloo and brings every rank's result back."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tests.forks import run_ranks


def launch(case: str, world_size: int, tmp_path: Path, *, timeout_s: float = 480.0, **arguments: Any) -> list[Any]:
    """`cases.<case>(**arguments)` on `world_size` ranks, or a function of another module; results in rank order.

    A rank that fails ends the others, and its output is shown.
    """
    folder = tmp_path / f"{case}-{world_size}"
    folder.mkdir()
    torch.save(arguments, folder / "arguments.pt")
    run_ranks(_run_case, case, folder, world_size=world_size, logs=folder, timeout_s=timeout_s)
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world_size)]


def _run_case(case: str, folder: Path) -> None:
    torch.set_num_threads(1)
    module, _, name = case.rpartition(".")
    cases = import_module(f"tests.distributed.{module or 'cases'}")
    arguments = torch.load(folder / "arguments.pt", weights_only=False)
    result = getattr(cases, name)(**arguments)
    torch.save(result, folder / f"result-{os.environ['RANK']}.pt")
