"""Records from files, reasoning-gym and Hugging Face datasets.

Third-party imports happen inside the functions: a run pays only for the source it names.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from megatron_reheat.config_data import DataConfig
from megatron_reheat.config_fields import shown
from megatron_reheat.data.arrow import read_dataset
from megatron_reheat.data.files import read_file
from megatron_reheat.data.records import Joined, Record, Records, Spooled
from megatron_reheat.errors import ConfigError
from megatron_reheat.files import problem_of_folder

# reasoning-gym makes problem i of seed s from s + i, so that neighbouring seeds share all but one problem.
_SEED_STRIDE = 1_000_003
_SEED_LIMIT = 2**31


def read_records(config: DataConfig, seed_offset: int = 0, section: str = "data") -> Records:
    """All records of the configured source; `config.size` limits only what reasoning-gym makes.

    Raises:
        ConfigError: naming the key (of the recipe's `section`) or `file:line` at fault.
    """
    if config.source == "reasoning_gym":
        return Spooled(_reasoning_gym_records(config, seed_offset, section))
    if config.path is None:
        return read_dataset(config, section)
    if isinstance(config.path, str) and _is_folder(config.path, section):
        return read_dataset(config, section)
    paths = [config.path] if isinstance(config.path, str) else config.path
    kind = ".jsonl" if config.source == "jsonl" else None
    parts = [read_file(Path(path), section=section, options=config.options, kind=kind) for path in paths]
    return parts[0] if len(parts) == 1 else Joined(parts)


def _is_folder(path: str, section: str) -> bool:
    if problem := problem_of_folder(Path(path)):
        raise ConfigError(f"{section}.path: cannot read {path}: {problem}")
    return Path(path).is_dir()


def _reasoning_gym_records(config: DataConfig, seed_offset: int, section: str) -> Iterator[Record]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise ConfigError(f"{section}.source=reasoning_gym needs reasoning-gym; pip install reasoning-gym") from None
    assert config.name is not None  # DataConfig requires it
    if config.name not in DATASETS:
        close = difflib.get_close_matches(config.name, DATASETS, n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see reasoning_gym.factory.DATASETS"
        raise ConfigError(f"{section}.name: reasoning-gym has no task {config.name!r}; {hint}")
    seed = (config.seed + seed_offset) * _SEED_STRIDE % _SEED_LIMIT
    sizes = {} if config.size is None else {"size": config.size}
    reserved = sorted({"seed", "size"} & config.options.keys())
    if reserved:
        raise ConfigError(
            f"{section}.options must not hold {', '.join(reserved)}; use {section}.seed and {section}.size"
        )
    try:
        dataset = reasoning_gym.create_dataset(config.name, seed=seed, **sizes, **config.options)
        for i in range(len(dataset)):
            yield dataset[i]
    except TypeError as error:
        raise ConfigError(
            f"{section}.options does not fit reasoning-gym task {config.name}: {error}; correct them"
        ) from error
    except (AssertionError, ValueError) as error:
        raise ConfigError(
            f"reasoning-gym task {config.name} cannot make problems from {section}.options {shown(config.options)}: {error}; "
            "correct them"
        ) from error
