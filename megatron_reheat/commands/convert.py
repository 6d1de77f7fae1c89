"""`reheat convert`: a checkpoint becomes a Hugging Face folder with its provenance, or the other way round."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_reheat.checkpoint_folder import best_checkpoint, checkpoint_step
from megatron_reheat.config import ModelConfig
from megatron_reheat.data.prompts import check_vocabulary
from megatron_reheat.data.tokenizer import read_tokenizer, stop_token_ids
from megatron_reheat.errors import ConfigError, ReheatError
from megatron_reheat.model.carried_files import read_carried_files
from megatron_reheat.model.checkpoint import carried_model, latest_checkpoint, read_state, verify_checkpoint
from megatron_reheat.model.conversion import (
    GREEDY_TOKENS,
    HFExport,
    Reference,
    compare_with_transformers,
    megatron_reference,
    saved_as,
    write_checkpoint,
)
from megatron_reheat.model.model_card import model_card
from megatron_reheat.model.provider import resolve_hf_folder
from megatron_reheat.run_folder import RunFolder, read_config_tree
from megatron_reheat.stages.inputs import read_model
from megatron_reheat.stages.run_state import RunState

# (folder, prompts, number of tokens) -> token ids and log-probabilities of each prompt's greedy continuation
Which = Literal["latest", "best"]
GreedySampler = Callable[[Path, list[list[int]], int], list[tuple[list[int], list[float]]]]


def to_hf(
    source: Path,
    out: Path,
    *,
    which: Which = "latest",
    hf_source: str | None = None,
    shard_gb: float = 4.0,
    verify: bool = True,
    temperature: float = 1.0,
    engine: GreedySampler | None = None,
    published_as: str | None = None,
) -> str:
    """Writes `out` from a checkpoint, or from a run folder's latest or best; returns one sentence about it.

    `out` appears when it is complete and verified, not before. Without `verify` memory stays near one shard; with it,
    it is about twice the model in float32.

    Args:
        hf_source: folder (or hub name) of configuration and tokenizer; by default the checkpoint's own, or, where an earlier
            version wrote it, the run's `model.hf_path`.
        temperature: the model will sample at 1 as the checkpoint does at this: exact flattening (`stages.flatten`).
        engine: an inference engine whose greedy samples are compared too.
        published_as: the hub name under which the model's card says it is loaded; by default `out`'s own.

    Raises:
        ReheatError: something is missing, damaged or does not fit, or the result does not compute the same.
    """
    if not 0 < shard_gb < math.inf:
        raise ConfigError(f"--shard-gb must be above 0 and finite, got {shard_gb:g}")
    if not 0 < temperature < math.inf:
        raise ConfigError(f"--temperature must be above 0 and finite, got {temperature:g}")
    refuse_existing(out)
    run, checkpoint = _find_checkpoint(source, which)
    own = carried_model(checkpoint)
    config = read_config_tree(run if own is None else checkpoint)
    hf_folder = _find_hf_folder(run, config, hf_source) if hf_source or own is None else own
    tokenizer = read_tokenizer(hf_folder)
    if problem := verify_checkpoint(checkpoint):
        raise ReheatError(problem)
    state = read_state(checkpoint)
    export = HFExport(checkpoint, hf_folder, temperature)
    check_vocabulary(tokenizer, export.hf.vocab_size)
    stops = stop_token_ids(export.hf, tokenizer, hf_folder, chat=_spoke_in_turns(config))
    with _written_aside(out) as partial:
        export.write(partial, shard_bytes=int(shard_gb * 1e9), stop_token_ids=stops)
        verified = "The weights were not verified (--no-verify)."
        if verify:
            reference = megatron_reference(checkpoint, hf_folder, export.dtype, temperature)
            verified = _verify(reference, partial, engine)
        if temperature != 1.0:
            verified += f" Its logits are the checkpoint's divided by {temperature:g}."
        card = model_card(
            run,
            config,
            state,
            name=published_as or out.name,
            has_chat_template=bool(tokenizer.chat_template),
            model_type=export.hf.model_type,
            num_parameters=export.num_parameters,
            dtype=str(export.dtype).removeprefix("torch."),
            verified=verified,
            stop_tokens=[f"{tokenizer.convert_ids_to_tokens(token_id)} ({token_id})" for token_id in stops],
        )
        (partial / "README.md").write_text(card)
        num_files = len(list(partial.glob("*.safetensors")))
    return f"{out}: {export.num_parameters / 1e6:,.2f}M parameters of {checkpoint} in {num_files} file(s). {verified}"


def from_hf(hf_path: str, out: Path, revision: str | None = None) -> str:
    """Writes a run folder whose checkpoint `step-0` holds the weights of a Hugging Face folder (or hub name).

    A run starts from it under any layout with `run.fork_from=OUT`; its optimizer starts fresh. Takes about
    three times the model's memory: the file, the model and the copy that is being written.

    Args:
        revision: a hub name's branch, tag or commit.

    Raises:
        ReheatError: the folder is incomplete or of an unsupported architecture, or `out` exists.
    """
    refuse_existing(out)
    model = read_model(ModelConfig(hf_path=hf_path, revision=revision), chat=False)
    hf_folder, dtype = model.path.resolve(), saved_as(model.path, model.hf)
    name = str(dtype).removeprefix("torch.")
    # a hub name stays one, for the card of what comes of it
    origin = str(hf_folder) if Path(hf_path).exists() else hf_path
    source = {"hf_path": origin} | ({} if revision is None else {"revision": revision})
    tree = {"model": {**source, "dtype": name}, "run": {"name": out.name}}
    config = yaml.safe_dump(tree, sort_keys=False)
    with _written_aside(out) as partial:
        folder = RunFolder(partial)
        carried = read_carried_files(config, hf_folder)
        write_checkpoint(hf_folder, folder.checkpoints, asdict(RunState()), dtype, carried)
        folder.config.write_text(config)
    return f"{out}: checkpoint step-0 with the weights of {hf_folder} in {name}; start from it with run.fork_from={out}"


def _verify(reference: Reference, converted: Path, engine: GreedySampler | None) -> str:
    gap = compare_with_transformers(converted, reference)
    text = (
        f"Verified: transformers' logits of {len(reference.prompts)} prompts equal Megatron's within {gap:.1e} "
        f"(limit {reference.tolerance:.1e}, float32)"
    )
    if engine is not None:
        samples = engine(converted, reference.prompts, GREEDY_TOKENS)
        text += (
            f"; vLLM's greedy tokens are the same, their log-probabilities within {_engine_gap(samples, reference):.1e}"
        )
    return f"{text}."


def _engine_gap(samples: list[tuple[list[int], list[float]]], reference: Reference) -> float:
    """Largest difference of log-probabilities; another token counts by how far it is from being the most likely."""
    gap = 0.0
    for index, (tokens, logprobs) in enumerate(samples):
        expected, own = reference.logprobs(index), reference.continuations[index]
        for position, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            distance = abs(logprob - expected[position, own[position]].item())
            gap = max(gap, distance) if distance == distance else float("inf")
            if token != own[position]:
                tie = (expected[position, own[position]] - expected[position, token]).item()
                gap = max(gap, tie)
                break  # from here on they continue different texts
    if gap > reference.tolerance:
        raise ReheatError(
            f"vLLM's greedy samples of the converted model differ from the checkpoint's by {gap:.2g} in log-probability "
            f"(limit {reference.tolerance:.2g})"
        )
    return gap


@contextmanager
def as_hf_folder(model: str, which: Which, hf_source: str | None) -> Iterator[tuple[str, str]]:
    """(name, Hugging Face folder) of a model to look at. A run's checkpoint is written out beside it meanwhile.

    Raises:
        ReheatError: there is no such checkpoint, or it cannot be written out.
    """
    found = find_in_run(model, which)
    if found is None:
        yield model, model
        return
    _, checkpoint = found
    try:
        scratch = tempfile.TemporaryDirectory(prefix=".hf-", dir=checkpoint.resolve().parent)
    except OSError as error:
        raise ReheatError(
            f"cannot write beside {checkpoint}: {error.strerror}; export it with reheat convert"
        ) from None
    with scratch as folder:
        out = Path(folder) / checkpoint.name
        to_hf(checkpoint, out, hf_source=hf_source, verify=False)
        yield str(checkpoint), str(out)


def find_in_run(model: str, which: Which) -> tuple[Path, Path] | None:
    """(run folder, checkpoint) of a model to look at; None of a Hugging Face folder or a hub name.

    Raises:
        ReheatError: there is no such checkpoint.
    """
    path = Path(model)
    is_hf_folder = checkpoint_step(path) is None or (path / "config.json").exists()
    if not RunFolder(path).checkpoints.is_dir() and is_hf_folder:
        return None
    return _find_checkpoint(path, which)


def _find_checkpoint(source: Path, which: Which) -> tuple[Path, Path]:
    """(run folder, checkpoint) of a checkpoint or a run folder; where a checkpoint was copied elsewhere, the first is none."""
    if not source.is_dir():
        raise ReheatError(f"{source} does not exist; name a checkpoint (runs/NAME/checkpoints/step-N) or a run folder")
    run = RunFolder(source)
    if not run.checkpoints.is_dir():
        return source.resolve().parent.parent, source
    checkpoint = latest_checkpoint(run.checkpoints) if which == "latest" else best_checkpoint(run.checkpoints)
    if checkpoint is None and which == "best":
        raise ReheatError(
            f"{run.checkpoints} holds no best checkpoint; let the run keep one (checkpoint.keep_best), or take the latest"
        )
    if checkpoint is None:
        raise ReheatError(f"{run.checkpoints} holds no complete checkpoint; let the run save one first")
    return source, checkpoint


def _find_hf_folder(run: Path, config: dict[str, Any], hf_source: str | None) -> Path:
    model = {"hf_path": hf_source} if hf_source else config.get("model")
    hf_path, revision = (model.get("hf_path"), model.get("revision")) if isinstance(model, dict) else (None, None)
    if not hf_path or not isinstance(hf_path, str):
        raise ConfigError(
            f"{RunFolder(run).config} does not name the model (model.hf_path), whose configuration and tokenizer are "
            "needed; keep the checkpoint in its run folder or give --hf-source FOLDER"
        )
    try:
        return resolve_hf_folder(ModelConfig(hf_path=hf_path, revision=revision if isinstance(revision, str) else None))
    except ConfigError as error:
        raise ConfigError(f"{error} (or give its present place with --hf-source FOLDER)") from None


def _spoke_in_turns(config: dict[str, Any]) -> bool:
    """Like `inputs.speaks_in_turns`, of a run whose configuration may be another version's."""
    held_out = config.get("eval") or {}
    suites = held_out.get("suites") or {}
    data = (config.get("data"), held_out.get("data"), *(suites.values() if isinstance(suites, dict) else ()))
    return any(isinstance(d, dict) and d.get("template") == "chat" for d in data)


def refuse_existing(out: Path) -> None:
    """
    Raises:
        ConfigError: there is something already.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; nothing is overwritten: name another folder or remove it")


@contextmanager
def _written_aside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when all went well and is removed otherwise."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}; name another folder") from None
    try:
        yield partial
        partial.rename(out)
    except OSError as error:
        if error.errno is None:  # not the operating system's
            raise
        raise ReheatError(f"cannot write {out}: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
