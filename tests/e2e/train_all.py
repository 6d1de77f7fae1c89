"""Trains the recipes of a folder one after the other in one process, on one engine: python -m tests.e2e.train_all FOLDER

Each is trained to its end, then again from its second step as if it had been killed there. What a run computes and does not log
goes into NAME.json, and a failure's traceback into NAME.error: one that fails leaves the others alone.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from megatron_reheat.checkpoint_folder import LATEST
from megatron_reheat.config import Config
from megatron_reheat.model.hf_reader import HFReader
from megatron_reheat.recipe import load_config
from megatron_reheat.run_folder import RunFolder
from megatron_reheat.stages.series import RunSeries
from megatron_reheat.types import POLICY, Prompt, Scores, TokenArray, TrainBatch

KILLED_AT = 2


def train(series: RunSeries, path: Path) -> None:
    config, started = load_config(path), time.perf_counter()
    folder = RunFolder(config.run.path)
    result = train_once(series, config)
    lines = folder.metrics.read_text().splitlines()
    result["lines"] = [json.loads(line) for line in lines]
    (folder.checkpoints / LATEST).write_text(f"step-{KILLED_AT}")
    train_once(series, config)
    result["seconds"] = time.perf_counter() - started
    path.with_suffix(".json").write_text(json.dumps(result))


def train_once(series: RunSeries, config: Config) -> dict[str, Any]:
    seen: list[dict[str, Any]] = []
    hints: list[int | None] = []
    with series.run(config) as run:
        run.method.weigh = watched(run.method.weigh, seen)
        run.engine.update = watched_update(run.engine.update, seen)
        tools = run.method.tools
        run.method.tools = replace(tools, hinted_prompt=counted(tools.hinted_prompt, hints))
        assert run.go()
        before = HFReader(run.inputs.hf_folder)
        moved = max((tensor - before.get(name)).abs().max().item() for name, tensor in run.engine.iter_hf_weights())
        costs = asdict(run.method.costs(config, run.method.options))
        return {"moved": moved, "seen": seen, "hints": hints, "costs": costs}


def watched(weigh: Any, seen: list[dict[str, Any]]) -> Any:
    """Notes what the mean entropy of the policy's own samples is, told by what they were sampled from and how."""

    def watch(batch: TrainBatch, scores: Scores, scoring: Any) -> TrainBatch:
        seen.append(measured(batch, scores))
        return weigh(batch, scores, scoring)

    return watch


def watched_update(update: Any, seen: list[dict[str, Any]]) -> Any:
    """The same of a step whose only update scores the batch itself."""

    def watch(batch: TrainBatch, *arguments: Any, **options: Any) -> Any:
        result = update(batch, *arguments, **options)
        if result.scores is not None:
            seen.append(measured(batch, result.scores))
        return result

    return watch


def measured(batch: TrainBatch, scores: Scores) -> dict[str, Any]:
    own = []
    for sequence, entropies in zip(batch.sequences, scores.entropies, strict=True):
        completion = sequence.completion
        if completion and (completion.sampler, completion.sampling_temperature) == (POLICY, 1.0):
            own.append(torch.from_numpy(entropies).double())
    entropy = torch.cat(own).mean().item() if own else None
    return {"own": len(own), "others": len(batch) - len(own), "entropy": entropy}


def counted(hinted_prompt: Callable[[Prompt, str | None], TokenArray | None], hints: list[int | None]) -> Any:
    """Notes of each teacher's prompt its length, or None where there was none."""

    def count(prompt: Prompt, solution: str | None) -> TokenArray | None:
        ids = hinted_prompt(prompt, solution)
        hints.append(None if ids is None else len(ids))
        return ids

    return count


def main() -> None:
    paths = sorted(Path(sys.argv[1]).glob("*.yaml"))
    with RunSeries(load_config(paths[0])) as series:
        for path in paths:
            try:
                train(series, path)
            except Exception:
                path.with_suffix(".error").write_text(traceback.format_exc())


if __name__ == "__main__":
    main()
