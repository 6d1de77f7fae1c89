"""How a rank finds out that another one is gone or stuck: what gloo and the store raise is told from any other error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import DistNetworkError, DistStoreError

from megatron_reheat.parallel.topology import is_lost_rank

RANK = """
import os, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist

rank, path, mode, limit = int(sys.argv[1]), sys.argv[2], sys.argv[3], timedelta(seconds=1)
if mode == "absent" and rank == 1:
    sys.exit()
x = torch.ones(1000)
try:
    alone = mode == "absent"
    store = dist.TCPStore("127.0.0.1", 0, 2, True, limit, False) if alone else dist.FileStore(path, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    dist.all_reduce(x)
    if rank == 1:
        time.sleep(0 if mode == "dead" else 4)
        os._exit(0)
    dist.all_reduce(x)
except Exception as error:
    if rank == 0:
        print(type(error).__name__, error)
"""


@pytest.mark.parametrize("mode", ["dead", "stuck", "absent"])
def test_what_is_raised_for_want_of_another_rank(tmp_path: Path, mode: str) -> None:
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), mode], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    output, _ = ranks[0].communicate(timeout=120)
    ranks[1].communicate(timeout=120)
    name, _, text = output.partition(" ")
    errors = {"RuntimeError": RuntimeError, "DistStoreError": DistStoreError, "DistNetworkError": DistNetworkError}
    assert is_lost_rank(errors[name](text)), output


def test_other_errors_are_not_taken_for_it() -> None:
    assert not is_lost_rank(RuntimeError("CUDA error: out of memory"))
