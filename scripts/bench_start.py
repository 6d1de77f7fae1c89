"""From the command to the first step: seconds and CPU seconds of the demo's recipe, beside another checkout's.

    python -m scripts.bench_start [--against CHECKOUT] [--rounds 3]

One RL step of a run of two ranks without a warm start, a fresh process each, the checkouts in turns. The other one needs a
`.venv/` of its own, or a link to one.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from examples.countdown_cpu.demo import make_inputs
from examples.elsewhere import ROOT


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    checkouts = [ROOT] if options.against is None else [options.against.resolve(), ROOT]
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), seed=0)
        for number in range(options.rounds):
            for checkout in checkouts:
                first, whole, cpu = measure(checkout, Path(folder), f"{number}-{checkouts.index(checkout)}")
                print(
                    f"{checkout.name}: first step after {first:.1f} s, the run {whole:.1f} s, {cpu:.1f} CPU seconds "
                    f"(load average {os.getloadavg()[0]:.1f})",
                    flush=True,
                )
    return 0


def measure(checkout: Path, inputs: Path, name: str) -> tuple[float, float, float]:
    """Seconds until the first step is reported, until the run has ended, and CPU seconds of all of its processes."""
    python = sys.executable if checkout == ROOT else str(checkout / ".venv" / "bin" / "python")
    keys = {
        "run.folder": f"{inputs}/{{name}}", "run.name": name, "model.hf_path": inputs / "model",
        "data.path": inputs / "task" / "train.jsonl", "eval.data": "", "sft.steps": 0, "run.steps": 1,
    }  # fmt: skip
    command = [python, "-W", "ignore", "-m", "megatron_reheat", "train", str(checkout / "yaml" / "countdown_cpu.yaml")]
    command += [f"{key}={value}" for key, value in keys.items()]
    before, started, first = _cpu_seconds(), time.monotonic(), float("nan")
    with subprocess.Popen(
        command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("rlvr"):
                first = time.monotonic() - started
    if process.returncode:
        sys.exit(f"the run of {checkout} ended with status {process.returncode}")
    return first, time.monotonic() - started, _cpu_seconds() - before


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    raise SystemExit(main())
