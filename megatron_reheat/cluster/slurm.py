"""Batch jobs for Slurm: a script that a cluster user can read and edit, made from a recipe and submitted."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_reheat.cluster.estimate import Estimate
from megatron_reheat.cluster.notice import MIN_NOTICE_S, check_against_limit, notice_for
from megatron_reheat.cluster.preflight import make_estimate, require_fit
from megatron_reheat.cluster.rollout_nodes import TEXTS, rollout_texts
from megatron_reheat.cluster.template import JobTemplate
from megatron_reheat.confidential import holds_secret
from megatron_reheat.config import Config
from megatron_reheat.errors import ConfigError, ModelElsewhereError, ReheatError
from megatron_reheat.recipe import load_config
from megatron_reheat.stop_request import REQUEUE_EXIT_CODE

TEMPLATE = Path(__file__).parent / "job.sbatch.template"
FORCE = "--force"


@dataclass(frozen=True)
class JobRequest:
    """What `reheat slurm` was asked for.

    `arms` are further recipes beside `config`; with `seeds`, every recipe runs once per seed. Each of these runs is one task
    of a job array. `cpu_tasks` replaces GPUs by that many processes a node. `rollout_nodes` are nodes of vLLM servers, beside
    `nodes`; empty `servers_per_node` is as many as a node has GPUs for. `gpu` is the kind whose memory the runs must fit,
    unless `force`. Empty `notice_s` follows from the estimate.
    """

    config: Path
    nodes: int
    command: Sequence[str]
    overrides: Sequence[str] = ()
    arms: Sequence[Path] = ()
    seeds: Sequence[int] = ()
    gpus_per_node: int = 8
    cpu_tasks: int | None = None
    rollout_nodes: int | None = None
    servers_per_node: int | None = None
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    container: str | None = None
    venv: Path | None = None
    gpu: str = "h100-80g"
    force: bool = False
    notice_s: int | None = None
    logs: Path = Path("runs/slurm")
    template: Path = TEMPLATE

    @property
    def per_node(self) -> int:
        """Processes on each of the trainer's nodes."""
        return self.gpus_per_node if self.cpu_tasks is None else self.cpu_tasks

    @property
    def python(self) -> str:
        """The interpreter as a word of the script: of the venv, of the container, else the one that runs here."""
        return "python" if self.venv else "python3" if self.container else shlex.quote(sys.executable)


@dataclass(frozen=True)
class Job:
    """`notes` are for whoever submits it."""

    name: str
    script: str
    notes: Sequence[str] = ()


def make_job(request: JobRequest) -> Job:
    """Checks every run of the job and writes the script's text; touches no file.

    Raises:
        ConfigError: a recipe is wrong, does not fit nodes x processes or the GPUs' memory, or would write into another one's
            run folder; or the notice is longer than the job.
    """
    _check(request)
    runs = [_arguments(*run, request) for run in _runs(request)]
    configs = [_load(path, overrides, request) for path, *overrides in runs]
    _check_folders(configs)
    for config in configs:
        _check_rollout(config, request)
    notice_s, notes = _notice(configs, request)
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in _run_name(request.config, request))
    try:
        script = JobTemplate(request.template.read_text()).substitute(
            command=shlex.join(request.command).replace("\n", " "),
            job_name=name,
            nodes=request.nodes,
            options="\n".join(f"#SBATCH --{option}" for option in _sbatch_options(request, len(runs))),
            signal=f"B:USR1@{notice_s}",
            runs="\n".join(f"    {i}) run=({shlex.join(run)}) ;;" for i, run in enumerate(runs)),
            logs=shlex.quote(str(request.logs)),
            environment=f"source {shlex.quote(str(request.venv))}/bin/activate" if request.venv else "",
            requeue_code=REQUEUE_EXIT_CODE,
            srun_options=_container_options(request),
            python=request.python,
            per_node=request.per_node,
            train_options=_train_options(request),
            **_rollout_texts(configs[0], request),
        )
    except OSError as error:
        raise ConfigError(f"--template {request.template} cannot be read: {error.strerror}; correct the path") from None
    except KeyError as error:
        raise ConfigError(f"--template {request.template}: unknown placeholder @@{{{error.args[0]}}}") from None
    except ValueError as error:
        raise ConfigError(f"--template {request.template}: {error}; write @@@@ for a literal @@") from None
    return Job(name, script, notes)


def write_job(job: Job, path: Path, logs: Path) -> None:
    """Writes the script, with an older one of other content kept beside it as NAME.previous, and makes the log folder.

    Raises:
        ReheatError: one of them cannot be written.
    """
    try:
        logs.mkdir(parents=True, exist_ok=True)  # Slurm does not make the folder of --output, and the job would fail
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.read_text() != job.script:
            path.replace(path.with_name(path.name + ".previous"))
        path.write_text(job.script)
    except OSError as error:
        raise ReheatError(f"cannot write {path} or {logs}: {error.strerror}; change --out or --logs") from None


def submit(script: Path) -> str:
    """Hands the file to sbatch; returns what it answered.

    Raises:
        ReheatError: there is no sbatch here, or it refused the job.
    """
    try:
        done = subprocess.run(["sbatch", str(script)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ReheatError(f"no sbatch on this machine; run `sbatch {script}` on a login node of the cluster") from None
    if done.returncode:
        raise ReheatError(f"sbatch refused {script}: {done.stderr.strip()}; edit it or change the options")
    return done.stdout.strip()


def _check(request: JobRequest) -> None:
    numbers = {"--nodes": request.nodes, "--gpus-per-node": request.gpus_per_node, "--cpu-tasks": request.cpu_tasks}
    numbers |= {"--rollout-nodes": request.rollout_nodes, "--servers-per-node": request.servers_per_node}
    for option, number in {**numbers, "--requeue-signal-s": request.notice_s}.items():
        if number is not None and number < 1:
            raise ConfigError(f"{option} {number} must be at least 1")
    names = ("config", "partition", "account", "time", "container", "venv", "logs", "template", "arms")
    texts = {name: str(getattr(request, name)) for name in names}
    overrides = {override.partition("=")[0]: override for override in request.overrides}
    for name, text in {**{f"--{name}": text for name, text in texts.items()}, **overrides}.items():
        if not text.isprintable():
            raise ConfigError(
                f"{name} must not hold line breaks or other control characters: a line of a script is one line"
            )
    for key, override in overrides.items():
        if holds_secret(key, override.partition("=")[2]):
            raise ConfigError(
                f"{key} holds a secret, which the script would show; give it in the environment (HF_TOKEN, "
                "AWS_SECRET_ACCESS_KEY, ...) or in a recipe that only you can read"
            )
    for option, value in (("--seeds", request.seeds), ("--arms", request.arms)):
        if len(set(value)) < len(value):
            raise ConfigError(f"{option} names one of its values twice; name each once")


def _notice(configs: Sequence[Config], request: JobRequest) -> tuple[int, list[str]]:
    """Seconds of the notice that is long enough for every run, and what to say about it. Refuses runs that do not fit."""
    estimates, notes = [], []
    for config in configs:
        try:
            estimates.append(_estimate(config, request))
        except ModelElsewhereError as error:
            notes.append(
                f"memory and notice are not estimated, because the model is not on this machine ({error}); the job checks "
                "its memory when it starts"
            )
    notice, why = MIN_NOTICE_S, ""
    for estimate in estimates:
        if request.cpu_tasks is None and not request.force:
            try:
                require_fit(estimate, request.gpu)
            except ConfigError as error:
                raise ConfigError(
                    f"{estimate.config.run.name}: {error}; --gpu names another kind, {FORCE} submits it all the same"
                ) from None
        notice, why = max((notice, why), notice_for(estimate), key=lambda n: n[0])
    if request.notice_s is not None:
        notice, what = request.notice_s, f"--requeue-signal-s {request.notice_s}"
    else:
        what = f"the notice of {notice} s{f' ({why})' if why else ''}"
        notes += [f"{what} before the job's end; --requeue-signal-s changes it"] if why else []
    check_against_limit(notice, what, request.time)
    return notice, list(dict.fromkeys(notes))


def _estimate(config: Config, request: JobRequest) -> Estimate:
    """Of the trainer's nodes, with all the servers of the others.

    Raises:
        ModelElsewhereError: its numbers are not to be had from here.
    """
    if request.rollout_nodes is not None:
        servers = request.rollout_nodes * _servers_per_node(config, request)
        rollout = config.rollout.model_copy(update={"num_servers": servers})
        config = config.model_copy(update={"rollout": rollout})
    kind = request.gpu if request.cpu_tasks is None else "cpu"
    return make_estimate(config, gpus=request.nodes * request.per_node, gpu=kind)


def _servers_per_node(config: Config, request: JobRequest) -> int:
    on_cpu = request.cpu_tasks is not None
    return request.servers_per_node or (1 if on_cpu else request.gpus_per_node // config.rollout.tensor)


def _train_options(request: JobRequest) -> str:
    """With a leading space."""
    if not request.force:
        return ""
    if "@@{train_options}" not in request.template.read_text():
        raise ConfigError(
            f"--template {request.template} has no @@{{train_options}}, which {FORCE} needs; put it where the package's "
            "job.sbatch.template has it"
        )
    return f" {FORCE}"


def _runs(request: JobRequest) -> Iterator[tuple[Path, int | None]]:
    for config in (request.config, *request.arms):
        for seed in request.seeds or (None,):
            yield config, seed


def _arguments(config: Path, seed: int | None, request: JobRequest) -> list[str]:
    arguments = [str(config), *request.overrides]
    if seed is None:
        return arguments
    return [*arguments, f"run.seed={seed}", f"run.name={_run_name(config, request)}-seed{seed}"]


def _run_name(config: Path, request: JobRequest) -> str:
    return load_config(config, request.overrides).run.name


def _load(path: str, overrides: Sequence[str], request: JobRequest) -> Config:
    config = load_config(path, overrides)
    world_size = request.nodes * request.per_node
    option = "--gpus-per-node" if request.cpu_tasks is None else "--cpu-tasks"
    try:
        config.data_parallel(world_size)
    except ConfigError as error:
        raise ConfigError(
            f"{path} does not fit --nodes {request.nodes} x {option} {request.per_node}: {error}"
        ) from None
    return config


def _check_folders(configs: Sequence[Config]) -> None:
    folders = [config.run.path for config in configs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ConfigError(
                f"two runs of the array would write to {folder}; give each recipe a run.name of its own and put {{name}} "
                "into run.folder"
            )


def _check_rollout(config: Config, request: JobRequest) -> None:
    """Whether servers and their nodes are asked for in the recipe and in the options alike."""
    rollout = config.rollout
    if request.rollout_nodes is None:
        if request.servers_per_node is not None:
            raise ConfigError("--servers-per-node needs --rollout-nodes, the number of nodes for the servers")
        if rollout.mode == "server" and not rollout.servers:
            raise ConfigError(
                "rollout.mode=server needs --rollout-nodes, nodes for the vLLM servers, or rollout.servers, the URLs of "
                "running ones (reheat serve)"
            )
        return
    if rollout.mode != "server":
        raise ConfigError(
            f"--rollout-nodes {request.rollout_nodes} needs rollout.mode=server; this run has {rollout.mode}: its engines "
            "are beside the trainer"
        )
    if rollout.servers:
        raise ConfigError(
            "--rollout-nodes starts servers of the job's own; leave rollout.servers empty, or the option out"
        )
    if request.arms or request.seeds:
        raise ConfigError(
            "--rollout-nodes makes a job of two parts, of which Slurm has no arrays; submit --arms and --seeds one by one"
        )
    needed = (request.servers_per_node or 1) * rollout.tensor
    if request.cpu_tasks is None and needed > request.gpus_per_node:
        raise ConfigError(
            f"--servers-per-node {request.servers_per_node or 1} x rollout.tensor {rollout.tensor} need {needed} GPUs, a "
            f"node has {request.gpus_per_node} (--gpus-per-node); lower one of them"
        )


def _rollout_texts(config: Config, request: JobRequest) -> dict[str, str]:
    if request.rollout_nodes is None:
        return dict.fromkeys(TEXTS, "")
    text = request.template.read_text()
    for name in TEXTS:
        if f"@@{{{name}}}" not in text:
            raise ConfigError(
                f"--template {request.template} has no @@{{{name}}}, which --rollout-nodes needs; put it where the "
                "package's job.sbatch.template has it"
            )
    return rollout_texts(
        [f"nodes={request.rollout_nodes}", "ntasks-per-node=1", *_node_options(request), "requeue"],
        _servers_per_node(config, request),
        python=request.python,
        srun_options=_container_options(request),
    )


def _sbatch_options(request: JobRequest, num_runs: int) -> Iterator[str]:
    yield from _node_options(request)
    if num_runs > 1:
        yield f"array=0-{num_runs - 1}"
    yield f"output={shlex.quote(str(request.logs / ('%x-%A_%a.log' if num_runs > 1 else '%x-%j.log')))}"


def _node_options(request: JobRequest) -> Iterator[str]:
    if request.cpu_tasks is None:
        yield f"gpus-per-node={request.gpus_per_node}"
        yield "exclusive"  # all cores and all memory: without it Slurm gives the node's one task a single core
        yield "mem=0"
    else:
        yield f"cpus-per-task={request.cpu_tasks}"
    for option, value in (("partition", request.partition), ("account", request.account), ("time", request.time)):
        if value is not None:
            yield f"{option}={shlex.quote(value)}"


def _container_options(request: JobRequest) -> str:
    """With a leading space.

    Pyxis, which most clusters with containers have; with Apptainer put `apptainer exec --nv IMAGE` before python.
    """
    if request.container is None:
        return ""
    return (
        f' --container-image={shlex.quote(request.container)} --container-mounts="$PWD:$PWD" --container-workdir="$PWD"'
    )
