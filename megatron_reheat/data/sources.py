"""Records (plain dictionaries) from reasoning-gym, JSONL files and Hugging Face datasets.

Third-party imports happen inside the functions: a run pays only for the source it names.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_reheat.config import DataConfig
from megatron_reheat.errors import ConfigError

Record = dict[str, Any]

# reasoning-gym makes problem i of seed s from s + i, so that neighbouring seeds share all but one problem.
_SEED_STRIDE = 1_000_003
_SEED_LIMIT = 2**31


def read_records(config: DataConfig, seed_offset: int = 0) -> Iterator[Record]:
    """The first `config.size` records of the configured source, or all of them.

    Raises:
        ConfigError: naming the key or `file:line` at fault.
    """
    if config.source == "reasoning_gym":
        return _reasoning_gym_records(config, seed_offset)
    reader = SOURCES[config.source]
    return itertools.islice(reader(config), config.size)


def _reasoning_gym_records(config: DataConfig, seed_offset: int) -> Iterator[Record]:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    assert config.name is not None  # DataConfig requires it
    if config.name not in DATASETS:
        close = difflib.get_close_matches(config.name, DATASETS, n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see reasoning_gym.factory.DATASETS"
        raise ConfigError(f"data.name: reasoning-gym has no task {config.name!r}; {hint}")
    seed = (config.seed + seed_offset) * _SEED_STRIDE % _SEED_LIMIT
    sizes = {} if config.size is None else {"size": config.size}
    reserved = sorted({"seed", "size"} & config.options.keys())
    if reserved:
        raise ConfigError(f"data.options must not hold {', '.join(reserved)}; use data.seed and data.size")
    try:
        dataset = reasoning_gym.create_dataset(config.name, seed=seed, **sizes, **config.options)
        records = [dataset[i] for i in range(len(dataset))]
    except TypeError as error:
        raise ConfigError(f"data.options does not fit reasoning-gym task {config.name}: {error}") from error
    except (AssertionError, ValueError) as error:
        raise ConfigError(
            f"reasoning-gym task {config.name} cannot make problems from data.options {config.options}: {error}"
        ) from error
    return iter(records)


def _jsonl_records(config: DataConfig) -> Iterator[Record]:
    assert config.path is not None  # DataConfig requires it
    path = Path(config.path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise ConfigError(f"data.path: cannot read {path}: {error.strerror}") from None
    with file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # JSON syntax or UTF-8
                raise ConfigError(f"{path}:{number} is not valid JSON: {error}") from None
            if not isinstance(record, dict):
                raise ConfigError(f"{path}:{number} must hold a JSON object, not a {type(record).__name__}")
            yield record


def _hugging_face_records(config: DataConfig) -> Iterator[Record]:
    import datasets
    from datasets.exceptions import DatasetsError

    if config.path is not None and not Path(config.path).is_dir():
        raise ConfigError(f"data.path: no such folder: {config.path}")
    place = f"data.path {config.path}" if config.path is not None else f"data.name {config.name}"
    try:
        if config.path is not None and _is_saved_to_disk(Path(config.path)):
            dataset = datasets.load_from_disk(config.path)
        else:
            dataset = datasets.load_dataset(config.path or config.name, split=config.split, **config.options)
    except (DatasetsError, OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{place}, data.split {config.split}: cannot load this dataset: {error}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if config.split not in dataset:
            raise ConfigError(f"data.split: {place} has no split {config.split!r}, only {', '.join(dataset)}")
        dataset = dataset[config.split]
    return iter(dataset)


def _is_saved_to_disk(folder: Path) -> bool:
    return any((folder / marker).is_file() for marker in ("dataset_dict.json", "state.json"))


SOURCES: dict[str, Callable[[DataConfig], Iterator[Record]]] = {
    "jsonl": _jsonl_records,
    "datasets": _hugging_face_records,
}
