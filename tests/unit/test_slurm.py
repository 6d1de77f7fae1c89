"""Batch scripts: what they say, what bash makes of it, and what is refused before anything is written."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_reheat import cli, stop_request
from megatron_reheat.cluster.notice import seconds_of
from megatron_reheat.cluster.preflight import make_estimate
from megatron_reheat.cluster.slurm import TEMPLATE, Job, JobRequest, make_job, submit, write_job
from megatron_reheat.errors import ConfigError, ReheatError
from megatron_reheat.recipe import load_config
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
model: {hf_path: a/model}
data: {path: prompts.jsonl}
parallel: {tensor: 2}
run: {name: first}
"""


@pytest.fixture
def request_(tmp_path: Path) -> JobRequest:
    (tmp_path / "first.yaml").write_text(RECIPE)
    (tmp_path / "second.yaml").write_text("base: first.yaml\nrun: {name: second}\n")
    return JobRequest(
        config=tmp_path / "first.yaml",
        nodes=2,
        command=["reheat", "slurm"],
        logs=tmp_path / "logs",
        venv=Path("/a venv"),
    )


def directives(job: Job) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in job.script.splitlines() if line.startswith("#SBATCH")]


def runs_of(job: Job, task: int | None) -> list[str]:
    """The arguments of `reheat train` as bash itself reads them from the script."""
    start = job.script.index("case ")
    block = job.script[start : job.script.index("esac") + 4]
    environment = {"PATH": os.environ["PATH"]} | ({} if task is None else {"SLURM_ARRAY_TASK_ID": str(task)})
    done = subprocess.run(
        ["bash", "-uc", block + '\nprintf "%s\\0" "${run[@]}"'],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split("\0")[:-1]


def test_directives_and_commands(request_: JobRequest) -> None:
    job = make_job(replace(request_, partition="gpu", account="us", time="24:00:00", notice_s=300))
    assert job.name == "first"
    logs = request_.logs
    assert directives(job) == [
        "job-name=first", "nodes=2", "ntasks-per-node=1", "gpus-per-node=8", "exclusive", "mem=0", "partition=gpu",
        "account=us", "time=24:00:00", f"output={logs}/%x-%j.log", "requeue", "open-mode=append", "signal=B:USR1@300",
    ]  # fmt: skip
    assert "source '/a venv'/bin/activate" in job.script
    assert '--nnodes "$SLURM_NNODES" --nproc_per_node 8' in job.script
    assert f'[ "$status" = {stop_request.REQUEUE_EXIT_CODE} ]' in job.script
    assert "@@" not in job.script
    assert subprocess.run(["bash", "-n"], input=job.script, text=True, check=False).returncode == 0


def test_nodes_without_gpus(request_: JobRequest) -> None:
    job = make_job(replace(request_, cpu_tasks=3, nodes=4))
    assert "cpus-per-task=3" in directives(job) and "--nproc_per_node 3" in job.script
    assert "gpus-per-node" not in job.script and "exclusive" not in directives(job)


def test_a_container_brings_its_own_python(request_: JobRequest) -> None:
    job = make_job(replace(request_, venv=None, container="registry/an image:1"))
    assert '%n.log" --container-image=\'registry/an image:1\' --container-mounts="$PWD:$PWD"' in job.script
    assert "python3 -m megatron_reheat.cluster.launch" in job.script and "activate" not in job.script


SERVERS = ["rollout.mode=server", "rollout.tensor=2"]


def test_rollout_nodes_are_a_second_part(request_: JobRequest) -> None:
    wanted = replace(request_, partition="gpu", time="24:00:00", rollout_nodes=3, overrides=SERVERS)
    job = make_job(wanted)
    node = ["gpus-per-node=8", "exclusive", "mem=0", "partition=gpu", "time=24:00:00"]
    trainers, servers = job.script.split("#SBATCH hetjob\n")
    assert directives(Job("", servers)) == ["nodes=3", "ntasks-per-node=1", *node, "requeue"]
    assert directives(Job("", trainers))[:8] == ["job-name=first", "nodes=2", "ntasks-per-node=1", *node]
    assert "signal=B:USR1@120" in directives(Job("", trainers))
    assert "--servers 4" in job.script and 'trap "" TERM; exec' in job.script and "@@" not in job.script
    assert "--servers 1 " in make_job(replace(wanted, servers_per_node=1)).script
    assert "--servers 1 " in make_job(replace(wanted, cpu_tasks=2)).script
    assert (
        job.script.index("srun --het-group=1") < job.script.index("cluster.launch") < job.script.index("&& scancel --")
    )


def test_the_trainer_is_told_of_every_server(request_: JobRequest, tmp_path: Path) -> None:
    """What bash makes of the lines before the trainer starts, read back as the run reads it."""
    script = make_job(replace(request_, rollout_nodes=2, servers_per_node=2, overrides=SERVERS)).script
    start = script.index("servers=''")
    lines = script[start : script.index("srun --het", start)] + script[script.index("run+=") :].partition("\n")[0]
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames gpu-[7,9]" ] && echo gpu-7 gpu-9\n')
    scontrol.chmod(0o755)
    done = subprocess.run(
        ["bash", "-uc", f'run=({request_.config})\nport=20007\n{lines}\nprintf "%s\\0" "${{run[@]}}"'],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST_HET_GROUP_1": "gpu-[7,9]"},
        capture_output=True,
        text=True,
        check=True,
    )
    path, override = done.stdout.split("\0")[:-1]
    assert load_config(path, [*SERVERS, override]).rollout.servers == (
        "http://gpu-7:20008", "http://gpu-7:20009", "http://gpu-9:20008", "http://gpu-9:20009",
    )  # fmt: skip


def test_running_servers_need_no_nodes(request_: JobRequest) -> None:
    overrides = ["rollout.mode=server", "rollout.servers=[http://elsewhere:8300]"]
    with_servers = make_job(replace(request_, overrides=overrides)).script
    alone = make_job(request_).script
    assert with_servers.replace(" " + shlex.join(overrides), "") == alone


@pytest.mark.parametrize(
    "override",
    ["data.system_prompt=two words", "data.system_prompt='it''s \"5$\" `x` @@ é'", "data.system_prompt=a\\nb"],
)
def test_overrides_reach_the_run_unchanged(request_: JobRequest, override: str) -> None:
    job = make_job(replace(request_, overrides=[override, "run.steps=3"]))
    assert runs_of(job, None) == [str(request_.config), override, "run.steps=3"]


def test_arms_and_seeds_make_an_array(request_: JobRequest) -> None:
    second = request_.config.with_name("second.yaml")
    job = make_job(replace(request_, arms=[second], seeds=[3, 5], overrides=["run.steps=2"]))
    assert "array=0-3" in directives(job) and f"output={request_.logs}/%x-%A_%a.log" in directives(job)
    expected = [
        [str(path), "run.steps=2", f"run.seed={seed}", f"run.name={path.stem}-seed{seed}"]
        for path in (request_.config, second)
        for seed in (3, 5)
    ]
    assert [runs_of(job, task) for task in range(4)] == expected
    with pytest.raises(subprocess.CalledProcessError):
        runs_of(job, 4)
    assert job.name == "first"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nodes": 1, "gpus_per_node": 7}, ["first.yaml", "--nodes 1 x --gpus-per-node 7", "parallel.tensor"]),
        ({"overrides": ["parallel.data=3"]}, ["--nodes 2 x --gpus-per-node 8", "set parallel.data=8"]),
        ({"nodes": 1, "cpu_tasks": 1}, ["--nodes 1 x --cpu-tasks 1", "parallel.tensor"]),
        ({"nodes": 0}, ["--nodes 0", "at least 1"]),
        ({"cpu_tasks": 0}, ["--cpu-tasks 0", "at least 1"]),
        ({"notice_s": 70000}, ["--requeue-signal-s 70000", "65535"]),
        ({"overrides": SERVERS}, ["rollout.mode=server needs --rollout-nodes", "rollout.servers"]),
        ({"rollout_nodes": 1}, ["--rollout-nodes 1 needs rollout.mode=server", "embedded"]),
        ({"rollout_nodes": 0, "overrides": SERVERS}, ["--rollout-nodes 0", "at least 1"]),
        ({"servers_per_node": 2}, ["--servers-per-node needs --rollout-nodes"]),
        (
            {"rollout_nodes": 1, "servers_per_node": 5, "overrides": SERVERS},
            ["--servers-per-node 5 x rollout.tensor 2 need 10 GPUs", "has 8 (--gpus-per-node)"],
        ),
        (
            {"rollout_nodes": 1, "gpus_per_node": 2, "overrides": ["rollout.mode=server", "rollout.tensor=4"]},
            ["rollout.tensor 4", "has 2 (--gpus-per-node)"],
        ),
        (
            {"rollout_nodes": 1, "overrides": [*SERVERS, "rollout.servers=[http://elsewhere:8300]"]},
            ["--rollout-nodes", "leave rollout.servers empty"],
        ),
        ({"rollout_nodes": 1, "overrides": SERVERS, "seeds": [0, 1]}, ["--rollout-nodes", "no arrays", "--seeds"]),
        ({"seeds": [1, 1]}, ["--seeds", "twice"]),
        ({"overrides": ["run.nam=x"]}, ["run.nam", "did you mean 'name'"]),
        ({"config": Path("gone.yaml")}, ["no such config file", "gone.yaml"]),
        ({"template": Path("/gone.template")}, ["--template /gone.template", "No such file"]),
    ],
)
def test_a_request_that_cannot_run_is_one_error(request_: JobRequest, change: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        make_job(replace(request_, **change))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not request_.logs.exists()


@pytest.mark.parametrize(
    "change", [{"overrides": ["run.name=same"]}, {"seeds": [0, 1], "overrides": ["run.folder=runs/one"]}]
)
def test_two_runs_may_not_share_a_folder(request_: JobRequest, change: dict) -> None:
    with pytest.raises(ConfigError, match=r"would write to runs/(same|one); give each recipe a run.name"):
        make_job(replace(request_, arms=[request_.config.with_name("second.yaml")], **change))


@pytest.mark.parametrize(("text", "word"), [("@@{nodez}", "unknown placeholder @@{nodez}"), ("a @@ b", "write @@@@")])
def test_a_wrong_template_is_named(request_: JobRequest, tmp_path: Path, text: str, word: str) -> None:
    template = tmp_path / "site.template"
    template.write_text(text)
    with pytest.raises(ConfigError, match=r"site\.template") as error:
        make_job(replace(request_, template=template))
    assert word in str(error.value)


def test_a_template_without_a_place_for_the_servers_is_refused(request_: JobRequest, tmp_path: Path) -> None:
    template = tmp_path / "site.template"
    template.write_text(TEMPLATE.read_text().replace("@@{end_servers}", ""))
    make_job(replace(request_, template=template))
    with pytest.raises(ConfigError, match=r"site\.template has no @@\{end_servers\}"):
        make_job(replace(request_, template=template, rollout_nodes=1, overrides=SERVERS))


# -- memory, and the notice before the end ----------------------------------------------------------------------------

TOO_LARGE = ["model.hf_path=Qwen/Qwen3-4B-Base", "parallel.microbatch_tokens=16384", "rollout.max_tokens=8192"]
FITS = [*TOO_LARGE, "model.recompute=full"]


def test_what_does_not_fit_the_gpus_is_not_submitted(request_: JobRequest) -> None:
    with pytest.raises(ConfigError, match=r"first: about 90\.2 GiB are needed on a h100-80g of 79.1; set ") as error:
        make_job(replace(request_, overrides=TOO_LARGE))
    assert "model.recompute=full (5" in str(error.value) and "--gpu names another kind, --force" in str(error.value)
    make_job(replace(request_, overrides=FITS))
    make_job(replace(request_, overrides=TOO_LARGE, gpu="h200-141g"))
    with pytest.raises(ConfigError, match=r"leaves a KV cache of 0 tokens"):
        make_job(replace(request_, overrides=["model.hf_path=Qwen/Qwen3-32B"]))
    with pytest.raises(ConfigError, match=r"--gpu v100 is not known"):
        make_job(replace(request_, overrides=FITS, gpu="v100"))
    make_job(
        replace(request_, overrides=[*TOO_LARGE, "run.steps=1"], cpu_tasks=2)
    )  # a node without GPUs has no limit here


def test_every_run_of_an_array_must_fit(request_: JobRequest) -> None:
    second = request_.config.with_name("second.yaml")
    second.write_text("base: first.yaml\nrun: {name: second}\nmodel: {recompute: none}\n")
    fits = [*TOO_LARGE, "parallel.tensor=2"]
    first = "base: first.yaml\nrun: {name: whole}\nmodel: {recompute: full}\n"
    whole = request_.config.with_name("whole.yaml")
    whole.write_text(first)
    make_job(replace(request_, config=whole, overrides=fits))
    with pytest.raises(ConfigError, match=r"^second: about "):
        make_job(replace(request_, config=whole, overrides=fits, arms=[second]))


def test_force_submits_and_starts_it_all_the_same(request_: JobRequest, tmp_path: Path) -> None:
    forced = replace(request_, overrides=TOO_LARGE, force=True)
    assert '-m megatron_reheat train --force "${run[@]}" &' in make_job(forced).script
    assert '-m megatron_reheat train "${run[@]}" &' in make_job(request_).script
    template = tmp_path / "site.template"
    template.write_text(TEMPLATE.read_text().replace("@@{train_options}", ""))
    with pytest.raises(ConfigError, match=r"site\.template has no @@\{train_options\}, which --force needs"):
        make_job(replace(forced, template=template))


def notice_of(job: Job) -> int:
    (signal,) = [d for d in directives(job) if d.startswith("signal=")]
    return int(signal.removeprefix("signal=B:USR1@"))


def test_the_notice_is_longer_than_a_step_and_a_save(request_: JobRequest) -> None:
    wanted = replace(request_, overrides=FITS)
    estimate = make_estimate(load_config(request_.config, FITS), gpus=16)
    longest = max(sum(estimate.rl_step().values()), sum(estimate.reheat_step().values()))
    job = make_job(wanted)
    assert longest + estimate.save_seconds() < notice_of(job) < 2 * longest + estimate.save_seconds() + 60
    assert any(f"the notice of {notice_of(job)} s (a step takes about" in note for note in job.notes)
    # of an array, the longest; another number of prompts takes another time
    second = request_.config.with_name("second.yaml")
    second.write_text("base: first.yaml\nrun: {name: second}\nrl: {prompts_per_step: 1024}\n")
    assert notice_of(make_job(replace(wanted, arms=[second]))) > 2 * notice_of(job)
    assert notice_of(make_job(replace(wanted, notice_s=7))) == 7


def test_without_the_model_there_is_a_notice_and_a_note(request_: JobRequest) -> None:
    job = make_job(request_)
    assert notice_of(job) == 120
    assert "memory and notice are not estimated, because the model is not on this machine" in job.notes[0]


def test_a_small_run_on_a_cpu_gets_the_shortest_notice(request_: JobRequest, tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    recipe = [f"model.hf_path={folder}", "rollout.max_tokens=16", "reheat.max_tokens=16", "data.max_prompt_tokens=16"]
    assert notice_of(make_job(replace(request_, cpu_tasks=2, overrides=[*recipe, "rl.prompts_per_step=4"]))) == 120


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("90", 5400), ("5:30", 330), ("1:00:00", 3600), ("2-12", 216000), ("1-0:30", 88200), ("1-2:03:04", 93784),
        ("0", None), ("UNLIMITED", None), ("infinite", None), (None, None),
    ],
)  # fmt: skip
def test_sbatch_forms_of_time(limit: str | None, seconds: int | None) -> None:
    assert seconds_of(limit) == seconds


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"notice_s": 600, "time": "10"}, ["--requeue-signal-s 600 is not shorter than the job, --time 10 (600 s)"]),
        ({"time": "2:00"}, ["the notice of 120 s is not", "--time 2:00 (120 s)"]),
        (
            {"time": "5:00", "overrides": FITS},
            ["the notice of", "a step takes about", "--time 5:00 (300 s)", "raise --time"],
        ),
        ({"time": "tomorrow"}, ["--time tomorrow is not a time"]),
        ({"time": "1:2:3:4"}, ["--time 1:2:3:4 is not a time"]),
    ],
)
def test_a_notice_longer_than_the_job_is_refused(request_: JobRequest, change: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        make_job(replace(request_, **change))
    assert all(word in str(error.value) for word in words), str(error.value)
    make_job(replace(request_, **{**change, "time": "10:00:00"}))


def test_an_edited_script_is_kept(tmp_path: Path) -> None:
    path, logs = tmp_path / "jobs" / "a.sbatch", tmp_path / "logs"
    write_job(Job("a", "edited"), path, logs)
    write_job(Job("a", "new"), path, logs)
    assert path.read_text() == "new" and path.with_name("a.sbatch.previous").read_text() == "edited"
    assert logs.is_dir()
    with pytest.raises(ReheatError, match="change --out or --logs"):
        write_job(Job("a", "new"), path / "below a file", logs)


def test_submission_errors_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ReheatError, match="no sbatch on this machine"):
        submit(tmp_path / "a.sbatch")
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho invalid partition >&2\nexit 1\n")
    sbatch.chmod(0o755)
    with pytest.raises(ReheatError, match=r"refused .*a.sbatch: invalid partition"):
        submit(tmp_path / "a.sbatch")


def test_a_dry_run_prints_and_writes_nothing(
    request_: JobRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["slurm", "first.yaml", "run.steps=1", "--nodes", "1", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")
    assert cli.main(["slurm", "first.yaml", "--nodes", "1", "--gpus-per-node", "3"]) == 1
    assert capsys.readouterr().err.count("error:") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("path", sorted((ROOT / "scripts" / "slurm").glob("*.sbatch")), ids=lambda p: p.name)
def test_the_examples_are_what_the_command_prints(path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    command = shlex.split(path.read_text().splitlines()[1].removeprefix("# Written by:"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", command)
    assert cli.main(command[1:]) == 0
    assert capsys.readouterr().out == path.read_text()


def test_there_are_examples_and_a_template() -> None:
    names = {p.name for p in (ROOT / "scripts" / "slurm").iterdir()}
    assert names == {"single_node.sbatch", "multi_node.sbatch", "rollout_nodes.sbatch"}
    assert TEMPLATE.is_file() and '"*.template"' in (ROOT / "setup.py").read_text()
