"""The command line: `reheat train CONFIG [key=value ...]`, `reheat report RUN ...`, `reheat slurm CONFIG ...`."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_reheat.cluster.launch import STOPPED, end_with_launcher, is_launched, launch_here
from megatron_reheat.config import Config, load_config
from megatron_reheat.errors import ConfigError, ReheatError, print_error
from megatron_reheat.stop_request import REQUEUE_EXIT_CODE, hold_stop_signal

# many times the launcher's monitoring interval
SECONDARY_FAILURE_WAIT_S = 3.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. Errors meant for the user are one line on stderr, without a traceback."""
    parsed = _parser().parse_args(arguments)
    _quiet_libraries()
    try:
        return parsed.run(parsed)
    except ReheatError as error:
        _report_error(error)
        return 1
    except KeyboardInterrupt:
        if not is_launched():
            print_error(STOPPED.format("SIGINT"))
        return 128 + signal.SIGINT
    except Exception:
        if is_launched():
            # when another rank failed first, its error counts: the launcher ends this one before the wait is over
            time.sleep(SECONDARY_FAILURE_WAIT_S)
        raise


def _report_error(error: ReheatError) -> None:
    """One line for all ranks: our launcher prints the first rank's; under another torchrun the first rank prints its own.

    torchrun's error file is written in any case, so that an error of a single rank is in torchrun's report.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": str(error), "timestamp": int(time.time())}))
    if not is_launched() and not (error.on_every_rank and int(os.environ.get("RANK", "0"))):
        print_error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reheat", description="Entropy-collapse repair for RL from verifiable rewards"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="run a recipe; starts its own processes unless torchrun already did")
    train.add_argument("config", type=Path)
    train.add_argument("overrides", nargs="*", metavar="key=value")
    train.set_defaults(run=_train)
    _add_eval(commands)
    report = commands.add_parser("report", help="draw one or more runs")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    report.add_argument("--out", type=Path, help="folder of the report; by default the last run's report/")
    report.set_defaults(run=_report)
    _add_convert(commands)
    _add_serve(commands)
    _add_slurm(commands)
    _add_check(commands)
    doctor = commands.add_parser("doctor", help="what is installed here, what is missing and what is used instead")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_check(commands: Any) -> None:
    command = commands.add_parser("check", help="validate a recipe and estimate its memory and time; needs no GPU")
    command.add_argument("config", type=Path)
    command.add_argument("overrides", nargs="*", metavar="key=value", help="directly after CONFIG")
    command.add_argument("--gpus", type=int, metavar="N", help="default: what the recipe asks for, else 8")
    command.add_argument(
        "--gpu", default="h100-80g", metavar="KIND", help="a100-80g, h100-80g, h200-141g, b200-192g, cpu"
    )
    command.add_argument(
        "--mean-tokens", type=float, metavar="T", help="mean response; default: max_tokens / 4, <= 2048"
    )
    command.set_defaults(run=_check)


def _check(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.config, parsed.overrides)

    from megatron_reheat.cluster.preflight import check

    check(config, gpus=parsed.gpus, gpu=parsed.gpu, mean_tokens=parsed.mean_tokens)
    return 0


def _doctor(parsed: argparse.Namespace) -> int:
    from megatron_reheat.cluster.doctor import examine

    return examine()


def _add_serve(commands: Any) -> None:
    command = commands.add_parser("serve", help="vLLM servers on this machine, for rollout.servers of a run elsewhere")
    command.add_argument("config", type=Path)
    command.add_argument("overrides", nargs="*", metavar="key=value", help="directly after CONFIG")
    command.add_argument("--host", default="0.0.0.0", help="interface; there is no password, so keep it a private one")
    command.add_argument("--port", type=int, default=8300, help="of the first server; the others follow")
    command.add_argument("--servers", type=int, metavar="N", help="default: GPUs / rollout.tensor, without GPUs 1")
    command.add_argument("--log-folder", type=Path, metavar="DIR", help="default: the run's logs/")
    command.set_defaults(run=_serve)


def _serve(parsed: argparse.Namespace) -> int:
    hold_stop_signal()  # a notice to all processes of a job is for the trainer, which still needs the servers
    config = load_config(parsed.config, parsed.overrides)

    from megatron_reheat.stages.serve import serve

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
        "--requeue-signal-s", dest="notice_s", type=int, default=120, metavar="S", help="notice before the job's end"
    )
    command.add_argument(
        "--template", type=Path, default=argparse.SUPPRESS, help="your site's, for the package's job.sbatch.template"
    )
    command.add_argument("--logs", type=Path, default=Path("runs/slurm"))
    command.add_argument("--out", type=Path, metavar="FILE", help="the script; default: LOGS/RUN_NAME.sbatch")
    command.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")
    command.set_defaults(run=_slurm)


def _add_eval(commands: Any) -> None:
    command = commands.add_parser("eval", help="sample a model on evaluation suites: avg@n and pass@k with intervals")
    command.add_argument("model", metavar="MODEL", help="Hugging Face folder or hub name")
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
    command.add_argument("--replicas", type=int, default=1, help="engines; one GPU each where there are GPUs")
    command.add_argument(
        "--engine", nargs="+", default=(), metavar="key=value", help="settings of a recipe's rollout section"
    )
    command.add_argument("--out", type=Path, help="folder of results and samples; default: runs/eval/MODEL/TIME")
    command.set_defaults(run=_eval)


def _eval(parsed: argparse.Namespace) -> int:
    from megatron_reheat.evaluation.evaluate import evaluate
    from megatron_reheat.evaluation.results import EvalOptions, print_table, results_table

    given: dict[str, Any] = {**vars(parsed), "suites": tuple(parsed.suites), "engine": tuple(parsed.engine)}
    del given["run"]
    options = EvalOptions(**given)
    try:
        print_table(results_table(evaluate(options), options))
    except KeyboardInterrupt:
        print_error("stopped by SIGINT; the suites that were finished are in results.json")
        return 128 + signal.SIGINT
    return 0


def _train(parsed: argparse.Namespace) -> int:
    hold_stop_signal()
    config = load_config(parsed.config, parsed.overrides)
    if "RANK" in os.environ:
        config.data_parallel(int(os.environ.get("WORLD_SIZE", "1")))
        if is_launched():
            end_with_launcher()
        return _run(config)
    parallel = config.parallel
    world_size = parallel.tensor * parallel.pipeline * config.data_parallel()
    if world_size > 1:
        return launch_here(world_size, ["train", str(parsed.config), *parsed.overrides])
    return _run(config)


def _run(config: Config) -> int:
    from megatron_reheat.stages.run import train

    return 0 if train(config) else REQUEUE_EXIT_CODE


def _report(parsed: argparse.Namespace) -> int:
    from megatron_reheat.analysis.report import write_report

    paths = write_report(parsed.runs, parsed.out)
    print(f"report: {paths.html}\npicture: {paths.png}")
    return 0


def _add_convert(commands: Any) -> None:
    command = commands.add_parser("convert", help="checkpoint -> Hugging Face folder, and back; one process, no GPU")
    direction = command.add_mutually_exclusive_group(required=True)
    direction.add_argument(
        "--to-hf",
        nargs=2,
        type=Path,
        metavar=("CHECKPOINT", "OUT"),
        help="runs/NAME/checkpoints/step-N, or a run folder for its latest",
    )
    direction.add_argument(
        "--from-hf", nargs=2, metavar=("MODEL", "OUT"), help="makes a run folder for run.fork_from, without optimizer"
    )
    command.add_argument(
        "--hf-source", metavar="FOLDER", help="configuration and tokenizer, where the run's have moved"
    )
    command.add_argument("--shard-gb", type=float, default=4.0, help="largest size of a weights file")
    command.add_argument("--no-verify", action="store_true", help="do not compare logits; memory stays at one shard")
    command.add_argument("--verify-vllm", action="store_true", help="compare vLLM's greedy samples too")
    command.set_defaults(run=_convert)


def _convert(parsed: argparse.Namespace) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("reheat convert is one process; start it without torchrun")
    if parsed.no_verify and parsed.verify_vllm:
        raise ConfigError("--no-verify and --verify-vllm exclude each other; leave one out")
    visible_devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a login node's GPU, or a busy one, has no part in this
    from megatron_reheat.rollout.load_check import sample_greedily
    from megatron_reheat.rollout.vllm_version import require_vllm
    from megatron_reheat.stages.convert import from_hf, to_hf

    if parsed.from_hf:
        print(from_hf(parsed.from_hf[0], Path(parsed.from_hf[1])))
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
            hf_source=parsed.hf_source,
            shard_gb=parsed.shard_gb,
            verify=not parsed.no_verify,
            engine=engine,
        )
    )
    return 0


def _slurm(parsed: argparse.Namespace) -> int:
    from megatron_reheat.cluster.slurm import JobRequest, make_job, submit, write_job

    arguments = {key: value for key, value in vars(parsed).items() if key not in ("run", "out", "dry_run")}
    if not parsed.venv and not parsed.container and sys.prefix != sys.base_prefix:
        arguments["venv"] = Path(sys.prefix)
    job = make_job(JobRequest(command=["reheat", *sys.argv[1:]], **arguments))
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
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
