"""What `datasets` reads: hub datasets, folders and Parquet, as Arrow files that all ranks of a node map into memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from megatron_reheat.config_data import DataConfig
from megatron_reheat.data.records import ArrowRows
from megatron_reheat.errors import ConfigError


def read_parquet(path: Path, section: str, options: Mapping[str, Any]) -> ArrowRows:
    """
    Raises:
        ConfigError: naming the file.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        metadata = parquet.read_metadata(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{path} cannot be read as parquet ({_one_line(error)}); copy it again") from None
    names = metadata.schema.to_arrow_schema().names
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{path} has two columns {twice[0]!r}; rename one of them")
    if not metadata.num_rows:
        raise ConfigError(f"{section}.path: {path} holds no records")
    _refuse(section, options, "data_files", "split")
    # `datasets` knows a converted file again by path and time alone; another file in its place may have the same time
    options = {**options, "name": _mark(path)}
    return ArrowRows(
        _load(f"{section}.path {path}", "parquet", data_files=str(path), split="train", **options), str(path)
    )


def _mark(path: Path) -> str:
    """A digest of the file's footer, which holds sizes, offsets and statistics of all its columns."""
    with path.open("rb") as file:
        size = file.seek(-8, os.SEEK_END) + 8
        footer = int.from_bytes(file.read(4), "little")
        file.seek(size - 8 - footer)
        return xxhash.xxh3_64_hexdigest(file.read(footer) + str(size).encode())


def read_dataset(config: DataConfig, section: str) -> ArrowRows:
    """A folder, or else a dataset of the hub.

    Raises:
        ConfigError: naming the key at fault.
    """
    import datasets

    place = f"{section}.name {config.name}" if config.path is None else f"{section}.path {config.path}"
    _refuse(section, config.options, "path", "split", "streaming")
    split_place = f"{place}, {section}.split {config.split}"
    if isinstance(config.path, str) and _is_saved_to_disk(Path(config.path)):
        try:
            dataset = datasets.load_from_disk(config.path)
        except Exception as error:  # as below
            raise ConfigError(f"{split_place}: cannot load this dataset: {_one_line(error)}") from None
    else:
        dataset = _load(split_place, config.path or config.name, split=config.split, **config.options)
    if isinstance(dataset, datasets.DatasetDict):
        if config.split not in dataset:
            raise ConfigError(f"{section}.split: {place} has no split {config.split!r}, only {', '.join(dataset)}")
        dataset = dataset[config.split]
    if not len(dataset):
        raise ConfigError(f"{split_place} holds no records")
    return ArrowRows(dataset, f"{config.path or config.name}, split {config.split}")


def _refuse(section: str, options: Mapping[str, Any], *names: str) -> None:
    if taken := sorted(set(names) & options.keys()):
        raise ConfigError(f"{section}.options must not hold {', '.join(taken)}; use {section}.path and {section}.split")


def _load(place: str, *arguments: Any, **options: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what goes wrong is told below, once
    try:
        return datasets.load_dataset(*arguments, **options)
    except (
        Exception
    ) as error:  # its readers are third-party code of many kinds, and pass on whatever goes wrong in them
        raise ConfigError(
            f"{place}: cannot load this dataset: {_one_line(error.__cause__ or error)}; correct the name or path"
        ) from error


def _is_saved_to_disk(folder: Path) -> bool:
    return any((folder / marker).is_file() for marker in ("dataset_dict.json", "state.json"))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
