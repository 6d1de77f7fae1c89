"""What a checkpoint costs: seconds beside those of a step, and host memory of each rank, in bytes a parameter.

    python -m scripts.bench_checkpoint [--ranks 2] [--layers 4] [--hidden 512] [--vocab 32768] [--tokens 2048]

Replicas with the distributed optimizer, float32 weights. Memory is the largest resident set while saving, and while loading,
less that of just before.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from megatron_reheat.losses.reheat import sft_loss
from megatron_reheat.model.checkpoint import install_checkpoint_fixes, load_checkpoint, save_checkpoint
from megatron_reheat.model.engine import Engine
from megatron_reheat.parallel import topology
from megatron_reheat.ports import free_port
from megatron_reheat.recipe import parse_config
from scripts.bench_engine import make_batch, make_model

ROUNDS = 3


class Cost(NamedTuple):
    """Of one rank."""

    step_s: float
    save_s: float
    load_s: float
    save_bytes: float
    load_bytes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=2048, help="of the batch that a step trains on")
    options = parser.parse_args()
    context, load = multiprocessing.get_context("spawn"), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, context.Pool(options.ranks) as ranks:
        make_model(options, Path(folder) / "model")
        measured = ranks.map(partial(measure, options, Path(folder), free_port()), range(options.ranks), chunksize=1)
    table = Table(
        title=f"{measured[0][0] / 1e6:.1f}M parameters, {options.ranks} replicas; load average {load:.1f} before"
    )
    for column in ("rank", "step, s", "save, s", "load, s", "save, bytes/parameter", "load, bytes/parameter"):
        table.add_column(column, justify="right")
    for rank, (parameters, cost) in enumerate(measured):
        memory = (f"{value / parameters:.1f}" for value in (cost.save_bytes, cost.load_bytes))
        table.add_row(str(rank), f"{cost.step_s:.2f}", f"{cost.save_s:.2f}", f"{cost.load_s:.2f}", *memory)
    Console().print(table)


def measure(options: argparse.Namespace, folder: Path, port: int, rank: int) -> tuple[int, Cost]:
    """One rank's part: parameters of the model, and what its steps, saves and loads cost."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(options.ranks),
        "LOCAL_WORLD_SIZE": str(options.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    batch = make_batch(options)
    config = parse_config(
        {
            "model": {"hf_path": str(folder / "model"), "dtype": "float32"},
            "data": {"path": "unused.jsonl", "max_prompt_tokens": 64},
            "rollout": {"max_tokens": 192},
            "reheat": {"max_tokens": 192},
            "parallel": {"data": options.ranks, "microbatch_tokens": 512},
        }
    )
    engine = Engine(config, folder / "model", topology.initialize(config))
    install_checkpoint_fixes()
    steps, saves, loads, saved, loaded = [], [], [], [], []
    for step in range(ROUNDS):
        started = time.perf_counter()
        engine.update(batch, sft_loss, lr=1e-4, weight_decay=0.0)
        steps.append(time.perf_counter() - started)
        before, started = start_peak(), time.perf_counter()
        checkpoint = save_checkpoint(engine, folder / "checkpoints", step, {}, keep=1)
        saves.append(time.perf_counter() - started)
        saved.append(peak() - before)
        before, started = start_peak(), time.perf_counter()
        load_checkpoint(engine, checkpoint)
        loads.append(time.perf_counter() - started)
        loaded.append(peak() - before)
    # of memory the first, later ones find what the process kept
    return engine.num_parameters, Cost(median(steps), median(saves), median(loads), saved[0], loaded[0])


def start_peak() -> int:
    """Forgets the largest resident set so far; returns that of now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The largest resident set since, in bytes."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
