"""What a checkpoint costs: seconds beside those of a step, and host memory of each rank, in bytes a parameter.

    python -m scripts.bench_checkpoint [--ranks 2] [--layers 4] [--hidden 512] [--vocab 32768] [--tokens 2048] [--rounds 5]

Replicas with the distributed optimizer, float32 weights. In each round come as many steps without a save as there were steps
while one was written in the background, begin and border included; then a save that is waited for, and a load. Memory is the
largest resident set meanwhile, less that of just before, in the first round: later ones find what the process kept.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from megatron_reheat.losses.reheat import sft_loss
from megatron_reheat.model.checkpoint import install_checkpoint_fixes, load_checkpoint
from megatron_reheat.model.checkpoint_save import CheckpointSaver, Contents, save_checkpoint
from megatron_reheat.model.engine import Engine
from megatron_reheat.parallel import topology
from megatron_reheat.ports import free_port
from megatron_reheat.recipe import parse_config
from scripts.bench_engine import make_batch, make_model


@dataclass
class Cost:
    """Of one rank: seconds by kind, and bytes of memory."""

    seconds: defaultdict[str, list[float]] = field(default_factory=partial(defaultdict, list))
    bytes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def of(self, kind: str, memory: bool = False) -> Iterator[None]:
        """Adds what is done inside; of memory what is counted first."""
        before, started = start_peak() if memory else 0, time.perf_counter()
        yield
        self.seconds[kind].append(time.perf_counter() - started)
        if memory:
            self.bytes.setdefault(kind, peak() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=2048, help="of the batch that a step trains on")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    context, load = multiprocessing.get_context("spawn"), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, context.Pool(options.ranks) as ranks:
        make_model(options, Path(folder) / "model")
        measured = ranks.map(partial(measure, options, Path(folder), free_port()), range(options.ranks), chunksize=1)
    table = Table(
        title=f"{measured[0][0] / 1e6:.1f}M parameters, {options.ranks} replicas, {options.rounds} rounds; load average "
        f"{load:.1f} before, {os.getloadavg()[0]:.1f} behind, {os.cpu_count()} cores"
    )
    columns = ("median, s", "longest, s", "times a step", "bytes/parameter")
    for column in ("rank", "what", *columns):
        table.add_column(column, justify="left" if column == "what" else "right", no_wrap=True)
    for rank, (parameters, cost) in enumerate(measured):
        step = median(cost.seconds[STEP])
        for kind, seconds in cost.seconds.items():
            memory = f"{cost.bytes[kind] / parameters:.1f}" if kind in cost.bytes else ""
            times = f"{median(seconds):.2f}", f"{max(seconds):.2f}", f"{median(seconds) / step:.2f}"
            table.add_row(str(rank), kind, *times, memory)
    Console(width=100).print(table)


STEP, SAVING = "a step", "a step while a save is written"


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
    checkpoints, cost = folder / "checkpoints", Cost()
    saver = CheckpointSaver(engine, checkpoints, in_background=True)

    def update() -> None:
        engine.update(batch, sft_loss, lr=1e-4, weight_decay=0.0)

    for number in range(options.rounds):
        update()  # the first one behind a load takes its memory anew
        saved, steps = None, 0
        with cost.of("from a save's begin to its end", memory=True):
            while saved is None:
                with cost.of(SAVING):
                    if not steps:
                        with cost.of("its begin"):
                            saver.begin(Contents(2 * number, {}, keep=1))
                    update()
                    with cost.of("its borders"):
                        saved = saver.finish(wait=False)
                steps += 1
        cost.seconds["until it is written"].append(saved.write_s)
        for _ in range(steps):
            with cost.of(STEP):
                update()
        with cost.of("a save that is waited for", memory=True):
            checkpoint = save_checkpoint(engine, checkpoints, 2 * number + 1, {}, keep=1)
        with cost.of("a load", memory=True):
            load_checkpoint(engine, checkpoint)
    return engine.num_parameters, cost


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
