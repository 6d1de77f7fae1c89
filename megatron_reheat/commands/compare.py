"""`reheat compare`, the microscope: how two policies differ on the same text, in their layers and in their weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_reheat.analysis.page import need_drawing
from megatron_reheat.commands.convert import Which, as_hf_folder, find_in_run
from megatron_reheat.config import ModelConfig
from megatron_reheat.data.tokenizer import end_token_id
from megatron_reheat.errors import ConfigError
from megatron_reheat.files import problem_of_folder
from megatron_reheat.microscope.displacement import BlockDisplacement, displacement, same_weights
from megatron_reheat.microscope.figures import Comparison
from megatron_reheat.microscope.measure import measure
from megatron_reheat.microscope.page import ComparePaths, check_out, write_comparison
from megatron_reheat.microscope.probe import Probe, read_probe, rollout_files
from megatron_reheat.microscope.table import print_comparison
from megatron_reheat.phases import announce
from megatron_reheat.run_folder import SIDES, RunFolder, read_metrics
from megatron_reheat.stages.inputs import ModelFolder, read_model

REFERENCE = "--reference"


@dataclass(frozen=True)
class CompareOptions:
    """The command's arguments. `data` None: a run's own rollouts; `out` None: `runs/compare/A-vs-B`. `b` None: the rounds of
    the run `a`, and `out` is for each its place in the report."""

    a: str
    b: str | None
    reference: str | None = None
    which: Which = "latest"
    hf_source: str | None = None
    data: Path | None = None
    limit: int = 256
    cka_tokens: int = 2048
    out: Path | None = None

    @property
    def named(self) -> dict[str, str]:
        """The models by the arguments that name them."""
        given = {"A": self.a, "B": self.b, REFERENCE: self.reference}
        return {argument: path for argument, path in given.items() if path is not None}


def compare(options: CompareOptions) -> list[ComparePaths]:
    """Prints the comparison, or one of each round of a run, writes it, and says where.

    Raises:
        ConfigError: before a model is loaded, naming the argument to change.
        ReheatError: a checkpoint is damaged, or the folder cannot be written.
    """
    _check(options)
    need_drawing("a comparison")
    if options.b is not None:
        return [_compare_two(options)]
    _check_folder("A", options.a)
    if options.out is not None:
        raise ConfigError("--out: the rounds of a run are written into its report; leave it out, or name B, too")
    run = RunFolder(Path(options.a))
    rounds = run.rounds
    if not rounds:
        raise ConfigError(
            f"A: {options.a} has no round of reheating with the policy before and after it (checkpoint.borders); name B, too"
        )
    written = []
    for number in rounds:
        before, after = (str(run.border(number, side)) for side in SIDES)
        files = [options.data] if options.data else _rollouts_of(run, number)
        of_round = replace(options, a=before, b=after, out=run.compared_borders(number))
        written.append(_compare_two(of_round, files))
    return written


def _rollouts_of(run: RunFolder, number: int) -> list[Path]:
    """What was sampled in the round, the last first, or in the step at whose end the policy was flattened.

    Raises:
        ConfigError: nothing was kept.
    """
    records = [r for r in read_metrics(run.path) if "stage" in r]
    steps = [r["step"] for r in records if (r["stage"], r.get("round")) == ("reheat", number)]
    if not steps:
        steps = [r["step"] for r in records if "flatten/temperature" in r][number - 1 : number]
    kept = [run.rollouts(step) for step in reversed(steps) if run.rollouts(step).exists()]
    if not kept:
        raise ConfigError(
            f"--data: {run.path} kept no rollouts of round {number} (logging.rollouts_per_step); name a file whose records "
            "have the texts prompt and response"
        )
    return kept


def _compare_two(options: CompareOptions, files: list[Path] | None = None) -> ComparePaths:
    """Runs' checkpoints are written out beside themselves as Hugging Face folders meanwhile.

    Raises:
        ConfigError: before a model is loaded, naming the argument to change.
        ReheatError: a checkpoint is damaged, or the folder cannot be written.
    """
    assert options.b is not None
    found = {argument: _find(argument, path, options.which) for argument, path in options.named.items()}
    out = (
        options.out or Path("runs") / "compare" / f"{_label(options.a, found['A'])}-vs-{_label(options.b, found['B'])}"
    )
    check_out(out)
    files = files or _probe_files(options, [found["B"], found["A"]])
    with ExitStack() as stack:
        names, models = {}, {}
        for argument, path in options.named.items():
            if found[argument] is not None:
                announce(f"writing {argument} out as a Hugging Face folder")
            names[argument], folder = stack.enter_context(as_hf_folder(path, options.which, options.hf_source))
            models[argument] = _read(argument, folder)
        comparison = _compare(options, names, models, _read_probe(options, models, files))
    print_comparison(comparison)
    return write_comparison(comparison, out)


def _compare(
    options: CompareOptions, names: dict[str, str], models: dict[str, ModelFolder], probe: Probe
) -> Comparison:
    a, b = models["A"], models["B"]
    notes, cka_tokens = list(probe.notes), options.cka_tokens
    depths = [model.hf.num_hidden_layers for model in (a, b)]
    if depths[0] != depths[1]:
        cka_tokens = 0
        notes.append(f"no CKA: A has {depths[0]} layers, B {depths[1]}")
    moved = _displacement(models, notes)
    measured = measure(a.path, b.path, probe, cka_tokens, announce)
    return Comparison(
        a=names["A"],
        b=names["B"],
        reference=names.get(REFERENCE),
        sources=tuple(map(str, probe.sources)),
        num_sequences=len(probe.sequences),
        num_cka_tokens=measured.num_cka_tokens,
        tokens=measured.tokens,
        cka=measured.cka,
        displacement=moved,
        notes=tuple(notes),
    )


def _displacement(models: dict[str, ModelFolder], notes: list[str]) -> tuple[BlockDisplacement, ...] | None:
    folders = {argument: model.path for argument, model in models.items()}
    if not same_weights(folders["A"], folders["B"]):
        notes.append("no displacement: the weights of A and B have different names or shapes")
        return None
    reference = folders.get(REFERENCE)
    if reference is not None and not same_weights(folders["A"], reference):
        notes.append(f"no cosine: the weights of A and {REFERENCE} have different names or shapes")
        reference = None
    announce("weights")
    return tuple(displacement(folders["A"], folders["B"], reference))


def _check(options: CompareOptions) -> None:
    if options.limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {options.limit}")
    if options.cka_tokens < 0 or options.cka_tokens == 1:
        raise ConfigError(f"--cka-tokens must be at least 2, or 0 for no CKA, got {options.cka_tokens}")


def _find(argument: str, path: str, which: Which) -> tuple[Path, Path] | None:
    _check_folder(argument, path)
    return find_in_run(path, which)


def _check_folder(argument: str, path: str) -> None:
    if problem := problem_of_folder(Path(path)):
        raise ConfigError(f"{argument}: {path} cannot be read: {problem}")
    if not Path(path).is_dir():
        raise ConfigError(
            f"{argument}: {path} is no folder; name a Hugging Face folder, a run's folder or a checkpoint "
            "(runs/NAME/checkpoints/step-N)"
        )


def _label(path: str, found: tuple[Path, Path] | None) -> str:
    if found is None:
        return Path(path).resolve().name
    run, checkpoint = found
    return f"{run.resolve().name}-{checkpoint.name}"


def _probe_files(options: CompareOptions, found: Sequence[tuple[Path, Path] | None]) -> list[Path]:
    if options.data is not None:
        return [options.data]
    for place in found:
        if place is not None and (files := rollout_files(*place)):
            return files
    raise ConfigError(
        "--data: neither B nor A is of a run that kept rollouts (logging.rollouts_per_step); name a file whose records have "
        "the texts prompt and response"
    )


def _read(argument: str, folder: str) -> ModelFolder:
    try:
        return read_model(ModelConfig(hf_path=folder), chat=False)
    except ConfigError as error:
        raise ConfigError(f"{argument}: {str(error).removeprefix('model.hf_path: ')}") from None


def _read_probe(options: CompareOptions, models: dict[str, ModelFolder], files: Sequence[Path]) -> Probe:
    a, b = models["A"], models["B"]
    if a.tokenizer.get_vocab() != b.tokenizer.get_vocab():
        raise ConfigError(
            "B: its tokenizer is not A's, so that no token's predictions compare; name two models of one family"
        )
    if a.hf.vocab_size != b.hf.vocab_size:
        raise ConfigError(
            f"B: it has logits for {b.hf.vocab_size} tokens, A for {a.hf.vocab_size}; name two models of one vocabulary"
        )
    context = min(model.hf.max_position_embeddings for model in (a, b))
    end = end_token_id(b.tokenizer, b.stop_token_ids)
    return read_probe(files, b.tokenizer, end, context, options.limit)
