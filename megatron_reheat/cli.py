"""The command line: `reheat train CONFIG [key=value ...]`, `reheat report RUN ...`, `reheat slurm CONFIG ...`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_reheat.cluster.launch import reporting_errors
from megatron_reheat.errors import ConfigError, print_error
from megatron_reheat.large_imports import large_imports
from megatron_reheat.phases import announce, let_announce
from megatron_reheat.recipe import load_config
from megatron_reheat.stop_request import STOP_SIGNAL, StopWatch, hold_stop_signals


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. Errors meant for the user are one line on stderr, without a traceback."""
    parsed = _parser().parse_args(arguments)
    _quiet_libraries()
    return reporting_errors(partial(parsed.run, parsed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reheat", description="Entropy-collapse repair for RL from verifiable rewards"
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="run a recipe; starts its own processes unless torchrun already did")
    train.add_argument("config", type=Path)
    train.add_argument("overrides", nargs="*", metavar="key=value", help="directly after CONFIG")
    train.add_argument(
        "--force", action="store_true", help="start even if the GPUs' memory is estimated not to suffice"
    )
    train.set_defaults(run=_train)
    _add_eval(commands)
    report = commands.add_parser("report", help="draw one or more runs, as one page and one picture")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    report.add_argument("--out", type=Path, help="folder of the report; by default the first run's report/")
    report.set_defaults(run=_report)
    _add_compare(commands)
    _add_convert(commands)
    _add_serve(commands)
    _add_slurm(commands)
    _add_check(commands)
    keys = commands.add_parser("config", help="the keys of a recipe: their values, defaults and meaning")
    keys.add_argument("section", nargs="?", help="rl, rollout, ...; default: all")
    keys.set_defaults(run=_config)
    doctor = commands.add_parser("doctor", help="what is installed here, what is missing and what is used instead")
    doctor.set_defaults(run=_doctor)
    return parser


def _version() -> str:
    try:
        return f"megatron_reheat {version('megatron_reheat')}"
    except PackageNotFoundError:  # a clone that is run as it lies
        return "megatron_reheat (not installed)"


def _add_check(commands: Any) -> None:
    command = commands.add_parser("check", help="validate a recipe and estimate its memory and time; needs no GPU")
    command.add_argument("config", type=Path)
    command.add_argument("overrides", nargs="*", metavar="key=value", help="directly after CONFIG")
    command.add_argument("--gpus", type=int, metavar="N", help="default: what the recipe asks for, else 8")
    command.add_argument(
        "--gpu", default="h100-80g", metavar="KIND", help="rtx3090-24g ... b200-192g, cpu; a wrong one lists all"
    )
    command.add_argument(
        "--mean-tokens", type=float, metavar="T", help="mean response; default: max_tokens / 4, <= 2048"
    )
    command.add_argument("--verbose", action="store_true", help="batches, scaling and what the estimate rests on, too")
    command.add_argument("--layouts", action="store_true", help="compare layouts for so many GPUs and recommend one")
    command.set_defaults(run=_check)


def _check(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.config, parsed.overrides)

    if parsed.layouts:
        from megatron_reheat.cluster.layouts import recommend

        asked = {} if parsed.gpus is None else {"gpus": parsed.gpus}
        recommend(config, **asked, gpu=parsed.gpu, mean_tokens=parsed.mean_tokens)
        return 0
    from megatron_reheat.cluster.preflight import check

    check(config, gpus=parsed.gpus, gpu=parsed.gpu, mean_tokens=parsed.mean_tokens, verbose=parsed.verbose)
    return 0


def _config(parsed: argparse.Namespace) -> int:
    from megatron_reheat.config_reference import print_reference

    print_reference(parsed.section)
    return 0


def _doctor(parsed: argparse.Namespace) -> int:
    from megatron_reheat.cluster.doctor import examine

    return examine()


def _add_serve(commands: Any) -> None:
    command = commands.add_parser("serve", help="vLLM servers on this machine, for rollout.servers of a run elsewhere")
    command.add_argument("config", type=Path)
    command.add_argument("overrides", nargs="*", metavar="key=value", help="directly after CONFIG")
    command.add_argument(
        "--host", default="127.0.0.1", help="interface; any other than this machine's own needs REHEAT_SERVER_TOKEN"
    )
    command.add_argument("--port", type=int, default=8300, help="of the first server; the others follow")
    command.add_argument("--servers", type=int, metavar="N", help="default: GPUs / rollout.tensor, without GPUs 1")
    command.add_argument("--log-folder", type=Path, metavar="DIR", help="default: the run's logs/")
    command.set_defaults(run=_serve)


def _serve(parsed: argparse.Namespace) -> int:
    # a notice to all processes of a job is for the trainer, which still needs the servers
    signal.pthread_sigmask(signal.SIG_BLOCK, {STOP_SIGNAL})
    config = load_config(parsed.config, parsed.overrides)

    from megatron_reheat.commands.serve import serve

    serve(config, host=parsed.host, port=parsed.port, servers=parsed.servers, log_folder=parsed.log_folder)
    return 0


def _add_slurm(commands: Any) -> None:
    command = commands.add_parser("slurm", help="write a batch job for a recipe and submit it")
    command.add_argument("config", type=Path)
    command.add_argument("overrides", nargs="*", metavar="key=value", help="directly after CONFIG")
    command.add_argument("--nodes", type=int, required=True)
    size = command.add_mutually_exclusive_group()
    size.add_argument("--gpus-per-node", type=int, default=8, metavar="N")
    size.add_argument("--cpu-tasks", type=int, metavar="K", help="nodes without GPUs: K processes on each")
    command.add_argument(
        "--rollout-nodes", type=int, metavar="M", help="further nodes for vLLM servers (rollout.mode=server)"
    )
    command.add_argument(
        "--servers-per-node", type=int, metavar="K", help="default: GPUs / rollout.tensor, without GPUs 1"
    )
    for option in ("partition", "account", "time"):
        command.add_argument(f"--{option}", help=f"sbatch's --{option}")
    place = command.add_mutually_exclusive_group()
    place.add_argument("--container", metavar="IMAGE", help="srun's --container-image (pyxis)")
    place.add_argument("--venv", type=Path, metavar="PATH", help="by default the one this command runs in")
    command.add_argument("--arms", type=Path, nargs="+", default=(), metavar="YAML", help="array: CONFIG and these")
    command.add_argument("--seeds", type=int, nargs="+", default=(), metavar="SEED", help="array: one task per seed")
    command.add_argument(
        "--gpu", default="h100-80g", metavar="KIND", help="whose memory it must fit, as in reheat check"
    )
    command.add_argument("--force", action="store_true", help="submit even if memory is estimated not to suffice")
    command.add_argument(
        "--requeue-signal-s", dest="notice_s", type=int, metavar="S",
        help="notice before the job's end; default: an estimated step and a save",
    )  # fmt: skip
    command.add_argument(
        "--template", type=Path, default=argparse.SUPPRESS, help="your site's, for the package's job.sbatch.template"
    )
    command.add_argument("--logs", type=Path, default=Path("runs/slurm"))
    command.add_argument("--out", type=Path, metavar="FILE", help="the script; default: LOGS/RUN_NAME.sbatch")
    command.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")
    command.set_defaults(run=_slurm)


def _add_eval(commands: Any) -> None:
    command = commands.add_parser("eval", help="sample a model on evaluation suites: avg@n and pass@k with intervals")
    command.add_argument(
        "model", metavar="MODEL", help="Hugging Face folder or hub name, a run's folder or a checkpoint"
    )
    _add_checkpoint(command)
    command.add_argument(
        "--suite", dest="suites", nargs="+", required=True, metavar="NAME", help="e.g. math500, reasoning_gym:countdown"
    )
    command.add_argument("--n", type=int, default=8, help="samples a problem")
    command.add_argument("--temperature", type=float, default=1.0)
    command.add_argument("--top-p", type=float, default=0.7)
    command.add_argument("--max-tokens", type=int, default=8192, help="longest response")
    command.add_argument("--seed", type=int, default=0, help="of sampling")
    command.add_argument("--limit", type=int, help="the first so many problems of each suite")
    command.add_argument("--data-root", type=Path, help="read suites from DATA_ROOT/NAME/ instead of the hub")
    command.add_argument(
        "--template", default="chat", help="chat, raw, or a text with the record's {fields}; default: chat"
    )
    command.add_argument(
        "--chat-template-kwargs", default="", metavar="YAML", help="for the chat template: '{enable_thinking: false}'"
    )
    command.add_argument("--replicas", type=int, default=1, help="engines; one GPU each where there are GPUs")
    command.add_argument(
        "--engine", nargs="+", default=(), metavar="key=value", help="settings of a recipe's rollout section"
    )
    command.add_argument("--out", type=Path, help="folder of results and samples; default: runs/eval/MODEL/TIME")
    command.set_defaults(run=_eval)


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument("--checkpoint", choices=("latest", "best"), default="latest", help="of a run folder")
    command.add_argument(
        "--hf-source", metavar="FOLDER", help="configuration and tokenizer, in place of the checkpoint's own"
    )


def _eval(parsed: argparse.Namespace) -> int:
    from megatron_reheat.commands.convert import as_hf_folder
    from megatron_reheat.evaluation.evaluate import evaluate
    from megatron_reheat.evaluation.results import (
        EvalOptions,
        SuiteResult,
        print_table,
        results_table,
        stopped_after,
    )

    hold_stop_signals()
    given: dict[str, Any] = {**vars(parsed), "suites": tuple(parsed.suites), "engine": tuple(parsed.engine)}
    which, hf_source = given.pop("checkpoint"), given.pop("hf_source")
    del given["run"]
    results: list[SuiteResult] = []
    options = EvalOptions(**given)
    stopped = partial(stopped_after, results, options)
    StopWatch(stopped, "stopping after the suite in progress").start()
    with as_hf_folder(parsed.model, which, hf_source) as (name, folder):
        options = replace(options, model=name, folder=folder)
        evaluate(options, results)
    if results:
        print_table(results_table(results, options))
    if len(results) < len(options.suites):
        print_error(stopped("request"))
        return 128 + signal.SIGINT
    return 0


def _train(parsed: argparse.Namespace) -> int:
    from megatron_reheat.commands.train import train

    return train(parsed.config, parsed.overrides, force=parsed.force)


def _report(parsed: argparse.Namespace) -> int:
    from megatron_reheat.analysis.report import write_report

    paths = write_report(parsed.runs, parsed.out)
    print(f"report: {paths.html}\npicture: {paths.png}")
    return 0


def _add_compare(commands: Any) -> None:
    command = commands.add_parser("compare", help="how two policies differ: KL, entropies, ranks, layers and weights")
    what = "Hugging Face folder, a run's folder or a checkpoint (any layout)"
    command.add_argument("a", metavar="A", help=what)
    command.add_argument(
        "b",
        metavar="B",
        nargs="?",
        help="the same; without B, before and after each round of the run A (checkpoint.borders)",
    )
    command.add_argument("--reference", metavar="C", help="also the cosine of the weights' ways from A to B and to C")
    _add_checkpoint(command)
    command.add_argument(
        "--data", type=Path, metavar="FILE", help="records with prompt and response; default: B's, else A's rollouts"
    )
    command.add_argument("--limit", type=int, default=256, metavar="N", help="sequences; default: 256")
    command.add_argument(
        "--cka-tokens", type=int, default=2048, metavar="N", help="whose layers' states are kept; 0: no CKA"
    )
    command.add_argument(
        "--out",
        type=Path,
        help="folder of figures, picture and page; default: runs/compare/A-vs-B, without B A's report",
    )
    command.set_defaults(run=_compare)


def _compare(parsed: argparse.Namespace) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("reheat compare is one process; start it without torchrun")
    let_announce(True)
    announce("importing torch and transformers")
    with large_imports():
        from megatron_reheat.commands.compare import CompareOptions, compare

    given: dict[str, Any] = {**vars(parsed), "which": parsed.checkpoint}
    del given["run"], given["checkpoint"]
    for paths in compare(CompareOptions(**given)):
        print(f"page: {paths.html}\npicture: {paths.png}\nfigures: {paths.json}")
    return 0


def _add_convert(commands: Any) -> None:
    command = commands.add_parser("convert", help="checkpoint -> Hugging Face folder, and back; one process, no GPU")
    direction = command.add_mutually_exclusive_group(required=True)
    direction.add_argument(
        "--to-hf",
        nargs=2,
        type=Path,
        metavar=("CHECKPOINT", "OUT"),
        help="runs/NAME/checkpoints/step-N, or a run folder",
    )
    direction.add_argument(
        "--from-hf", nargs=2, metavar=("MODEL", "OUT"), help="makes a run folder for run.fork_from, without optimizer"
    )
    direction.add_argument(
        "--converted", type=Path, metavar="FOLDER", help="a folder by --to-hf that only has to be uploaded, with --push"
    )
    command.add_argument("--push", metavar="USER/NAME", help="upload the converted folder to the Hugging Face Hub")
    command.add_argument("--private", action="store_true", help="--push: as a private repository, where it is new")
    command.add_argument(
        "--revision",
        metavar="BRANCH",
        help="--push: to this branch, made where there is none; --from-hf: the hub name's",
    )
    _add_checkpoint(command)
    command.add_argument("--shard-gb", type=float, default=4.0, help="largest size of a weights file")
    command.add_argument("--no-verify", action="store_true", help="do not compare logits; memory stays at one shard")
    command.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="divide all logits by T: flatten (or sharpen) the policy",
    )
    command.add_argument("--verify-vllm", action="store_true", help="compare vLLM's greedy samples too")
    command.set_defaults(run=_convert)


def _convert(parsed: argparse.Namespace) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("reheat convert is one process; start it without torchrun")
    if parsed.no_verify and parsed.verify_vllm:
        raise ConfigError("--no-verify and --verify-vllm exclude each other; leave one out")
    _check_push_options(parsed)
    visible_devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a login node's GPU, or a busy one, has no part in this
    from megatron_reheat.commands.convert import from_hf, refuse_existing, to_hf
    from megatron_reheat.commands.push import Push, converted_files
    from megatron_reheat.rollout.load_check import sample_greedily
    from megatron_reheat.rollout.vllm_version import require_vllm

    if parsed.from_hf:
        print(from_hf(parsed.from_hf[0], Path(parsed.from_hf[1]), parsed.revision))
        return 0
    push = Push(parsed.push, parsed.private, parsed.revision) if parsed.push else None
    if push is not None:
        if parsed.converted:
            converted_files(parsed.converted)
        else:
            refuse_existing(parsed.to_hf[1])
        push.check()
        if parsed.converted:
            print(push.upload(parsed.converted))
            return 0
    engine = None
    if parsed.verify_vllm:
        require_vllm()
        engine = partial(sample_greedily, visible_devices=visible_devices)
    source, out = parsed.to_hf
    print(
        to_hf(
            source,
            out,
            which=parsed.checkpoint,
            hf_source=parsed.hf_source,
            shard_gb=parsed.shard_gb,
            verify=not parsed.no_verify,
            temperature=parsed.temperature,
            engine=engine,
            published_as=parsed.push,
        ),
        flush=True,
    )
    if push is not None:
        print(push.upload(out))
    return 0


def _check_push_options(parsed: argparse.Namespace) -> None:
    if parsed.converted and not parsed.push:
        raise ConfigError("--converted names what is uploaded; say where to with --push USER/NAME")
    if parsed.push and parsed.from_hf:
        raise ConfigError(
            "--push uploads a converted folder, which --from-hf does not make; use --to-hf or --converted"
        )
    if parsed.private and not parsed.push:
        raise ConfigError("--private is for --push USER/NAME; leave it out, or add that")
    if parsed.revision is not None and parsed.to_hf and not parsed.push:
        raise ConfigError("--revision is for --push or --from-hf; leave it out, or add one of them")


def _slurm(parsed: argparse.Namespace) -> int:
    from megatron_reheat.cluster.slurm import JobRequest, make_job, submit, write_job

    arguments = {key: value for key, value in vars(parsed).items() if key not in ("run", "out", "dry_run")}
    if not parsed.venv and not parsed.container and sys.prefix != sys.base_prefix:
        arguments["venv"] = Path(sys.prefix)
    job = make_job(JobRequest(command=["reheat", *sys.argv[1:]], **arguments))
    for note in job.notes:
        print(f"note: {note}", file=sys.stderr)
    if parsed.dry_run:
        print(job.script, end="")
        return 0
    path = parsed.out or parsed.logs / f"{job.name}.sbatch"
    write_job(job, path, parsed.logs)
    print(f"script: {path}\n{submit(path)}; output under {parsed.logs}/")
    return 0


def _quiet_libraries() -> None:
    """Libraries warn about what they cannot know here (missing Transformer Engine, deprecations of their own)."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it is read when that is imported
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    # on a CPU machine with a compiler for CUDA, torch's CUDA build says in every process that there is no GPU
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
