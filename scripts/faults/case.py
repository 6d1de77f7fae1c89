"""What a fault is: a good set-up, what is broken in it, and the words that the refusal must hold."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from examples.countdown_cpu.make_model import make_model, make_tokenizer

CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
ALPHABET = "0123456789+-*/()|,= "  # the tokenizer's


class Bench:
    """A folder with a recipe that works, of which every fault breaks one thing."""

    def __init__(self, folder: Path, model: Path, *, copies_model: bool) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.model = Path(shutil.copytree(model, folder / "model")) if copies_model else model
        self.canary = folder / "executed"  # what code that must not run would make
        for name in ("train", "eval"):
            lines = [f'{{"question": "{i}+{len(name)}", "answer": "{i + len(name)}"}}\n' for i in range(8)]
            (folder / f"{name}.jsonl").write_text("".join(lines))
        self.tree: dict[str, Any] = {
            "model": {"hf_path": str(self.model), "dtype": "float32"},
            "parallel": {"data": 1, "microbatch_tokens": 512},
            "data": {"path": str(folder / "train.jsonl"), "max_prompt_tokens": 12, "solution_template": "{answer}"},
            "reward": {"kind": "math", "workers": 1},
            "rollout": {"max_tokens": 8, "enforce_eager": True, "kv_cache_mb": 32, "threads": 1},
            "reheat": {"max_tokens": 8},
            "eval": {"data": {"path": str(folder / "eval.jsonl"), "max_prompt_tokens": 12}, "max_tokens": 8},
            "run": {"name": "run", "folder": str(folder / "runs" / "{name}"), "steps": 7},
        }

    def recipe(self, **sections: dict[str, Any]) -> Path:
        """Writes it, with the keys of `sections` changed."""
        tree = copy.deepcopy(self.tree)
        for name, keys in sections.items():
            tree.setdefault(name, {}).update(keys)
        return self.file("recipe.yaml", yaml.safe_dump(tree))

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


@dataclass(frozen=True)
class Case:
    """`make` breaks one thing and returns the arguments of `reheat`; the refusal must hold one of `words`.

    `without_rights`: as a user who owns nothing. `copies_model`: the model's folder is what is broken.
    """

    kind: str
    name: str
    words: Sequence[str]
    make: Callable[[Bench], Sequence[str | Path]]
    without_rights: bool = False
    copies_model: bool = False
    servers: Sequence[str] = field(default=())


def make_good_model(folder: Path) -> Path:
    make_model(0, layers=2, width=32).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)  # for a user without rights, too
    return folder


def override(kind: str, *overrides: str, words: Sequence[str], command: str = "train") -> Case:
    """The good recipe with `key=value` behind it; {folder} in a value is the bench's."""

    def make(bench: Bench) -> list[str | Path]:
        filled = [o.replace("{folder}", str(bench.folder)) for o in overrides]
        return [command, bench.recipe(), *filled]

    name = " ".join(overrides)
    return Case(kind, name if len(name) <= 60 else name[:57] + "...", words, make)


def text(kind: str, name: str, content: str | bytes, words: Sequence[str] = ("recipe.yaml",)) -> Case:
    """A recipe of this text; {good} in it is the good recipe's."""

    def make(bench: Bench) -> list[str | Path]:
        good = bench.recipe().read_bytes()
        raw = content.encode() if isinstance(content, str) else content
        return ["train", bench.file("recipe.yaml", raw.replace(b"{good}", good))]

    return Case(kind, name, words, make)
