"""The small files that a checkpoint carries beside its tensors, so that it can be used without its run and its model's folder.

config.yaml   the run's resolved configuration, without secrets
hf/           config.json, generation_config.json and the tokenizer's files of the model's folder, byte by byte; no weights
"""

from __future__ import annotations

from pathlib import Path

from megatron_reheat.model.hf_writer import COPIED_FILES

CONFIG = "config.yaml"
MODEL_FOLDER = "hf"


def read_carried_files(config_text: str, hf_folder: Path) -> dict[str, bytes]:
    """By their paths in a checkpoint. Read when a run starts: what is saved later are the files that it was started with,
    whatever has become of the model's folder by then. Copies, because whoever edits a file would edit a link to it, too.
    """
    names = ("config.json", *COPIED_FILES)
    model = {
        f"{MODEL_FOLDER}/{name}": (hf_folder / name).read_bytes() for name in names if (hf_folder / name).is_file()
    }
    return {CONFIG: config_text.encode(), **model}


def is_carried(name: str) -> bool:
    """Whether a file of a checkpoint, by its path in there, is one of these."""
    return name == CONFIG or name.startswith(f"{MODEL_FOLDER}/")
