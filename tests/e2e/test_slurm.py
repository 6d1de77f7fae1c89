"""Runs that are told to stop save, end with the requeue status and go on; under a batch script they do so by themselves.

Only the scheduler is a stand-in (`sbatch`, `srun` and `scontrol` below): the script is the generated one, and the run is real,
as two nodes of one process each.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from megatron_reheat.stop_request import REQUEUE_EXIT_CODE
from tests.e2e import runs

TOTAL = 13  # 6 warm-start and 7 other steps

STAND_INS = {
    # starts the script as job JOB_ID and returns at once; its output is in job.log, its process id in job.pid
    "sbatch": """
script=$1
name=$(sed -n 's/^#SBATCH --job-name=//p' "$script")
nodes=($(sed -n 's/^#SBATCH --nodes=//p' "$script"))
cp "$script" "$STAND_IN/script"
if grep -q '^#SBATCH hetjob' "$script"; then
    export SLURM_JOB_ID_HET_GROUP_1=$((JOB_ID + 1)) SLURM_JOB_NUM_NODES_HET_GROUP_1=${nodes[1]}
    export SLURM_JOB_NODELIST_HET_GROUP_1=localhost
fi
SLURM_JOB_ID=$JOB_ID SLURM_JOB_NAME=$name SLURM_NNODES=${nodes[0]} SLURM_JOB_NODELIST=localhost \\
    setsid bash "$STAND_IN/script" >>"$STAND_IN/job.log" 2>&1 &
echo $! >"$STAND_IN/job.pid"
echo "Submitted batch job $JOB_ID"
""",
    # one process a node, all on this machine; signals go on to every process of the step, which is the harsher of Slurm's
    # two ways (proctrack/linuxproc; with cgroups only the tasks themselves get them). Where there is a trainer.py, it takes the
    # trainer's place.
    "srun": """
nodes=$SLURM_NNODES group=0
while [[ $1 == --* ]]; do
    [[ $1 == --output=* ]] && output=${1#--output=}
    [[ $1 == --het-group=1 ]] && nodes=$SLURM_JOB_NUM_NODES_HET_GROUP_1 group=1
    shift
done
if [[ $group == 0 && -e $STAND_IN/trainer.py ]]; then
    python=$1
    while [[ $1 != train ]]; do shift; done
    set -- "$python" "$STAND_IN/trainer.py" "${@:2}"
fi
tasks=()
tree() { local pid; for pid in $(ps -o pid= --ppid "$1"); do tree "$pid"; echo "$pid"; done; }
pass_on() { kill -"$1" $(tree $$) 2>/dev/null; }
trap 'pass_on USR1' USR1
for ((node = 0; node < nodes; node++)); do
    SLURM_NODEID=$node "$@" >>"${output/\\%n/$node}" 2>&1 &
    tasks+=($!)
done
echo "${tasks[@]}" >"$STAND_IN/group-$group"
worst=0 running=${#tasks[@]}
while ((running > 0)); do
    unset finished
    wait -n -p finished
    status=$?
    [[ -v finished ]] || continue  # a signal came
    ((running--))
    ((status > worst)) && worst=$status
    ((status)) && kill -TERM "${tasks[@]}" 2>/dev/null  # --kill-on-bad-exit
done
exit "$worst"
""",
    "scontrol": """
case $1 in
    show) echo localhost ;;
    requeue)
        echo "$2" >>"$STAND_IN/requeued"
        export SLURM_RESTART_COUNT=$(grep -c . "$STAND_IN/requeued")
        setsid bash "$STAND_IN/script" >>"$STAND_IN/job.log" 2>&1 &
        echo $! >"$STAND_IN/job.pid" ;;
    *) exit 1 ;;
esac
""",
    "scancel": """
[[ $1 == --signal=INT && $2 == $SLURM_JOB_ID_HET_GROUP_1 ]] && kill -INT $(<"$STAND_IN/group-1")
""",
}

# is told of the servers, uses them until the notice and after it, and fails when it was started again
TRAINER = """
import os, signal, sys, time, urllib.error, urllib.request
from pathlib import Path
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
from megatron_reheat.recipe import load_config

servers = load_config(sys.argv[1], sys.argv[2:]).rollout.servers
def are_healthy():
    try:
        return all(urllib.request.urlopen(server + "/health", timeout=20).status == 200 for server in servers)
    except OSError:
        return False

if "SLURM_RESTART_COUNT" in os.environ:
    output = Path(os.environ["STAND_IN"]) / "logs" / (os.environ["SLURM_JOB_NAME"] + "-" + os.environ["SLURM_JOB_ID"])
    while (output / "rollout-0.log").read_text().count(" on CPU, log") < 2:
        time.sleep(0.1)
    sys.exit(3)
while not are_healthy():
    time.sleep(0.2)
def answer(server, **headers):
    try:
        request = urllib.request.Request(server + "/pause", headers=headers, method="POST")
        return urllib.request.urlopen(request, timeout=60).status
    except urllib.error.HTTPError as error:
        return error.code
right = {"Authorization": "Bearer " + os.environ["REHEAT_SERVER_TOKEN"]}
answers = {(answer(server), answer(server, Authorization="Bearer x"), answer(server, **right)) for server in servers}
assert answers == {(401, 401, 200)}, answers
print("healthy:", *servers, flush=True)
signal.sigwait({signal.SIGUSR1})
time.sleep(1)
sys.exit(85 if are_healthy() else "the notice ended the servers")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("slurm")
    runs.make_model_folder(root / "model")
    tree = runs.recipe(root / "model", root)
    # saves only when it must: what is not saved on notice is lost
    tree["checkpoint"]["every"] = 0
    runs.write_recipe({**tree, "eval": {}}, root / "recipe.yaml")
    return root


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment in which the stand-ins are the cluster; they keep their notes in `tmp_path`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in STAND_INS.items():
        (folder / name).write_text("#!/bin/bash\n" + body)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "STAND_IN": str(tmp_path), "JOB_ID": "7"}


def test_a_batch_job_is_preempted_requeued_and_finishes(root: Path, tmp_path: Path, cluster: dict[str, str]) -> None:
    run = root / "job"
    submit(root, tmp_path, cluster, "run.name=job")
    try:
        wait_for(lambda: len(trained(run)) >= 2, tmp_path)
        os.kill(job_pid(tmp_path), signal.SIGUSR1)  # what `#SBATCH --signal=B:USR1@...` does
        wait_for(lambda: (tmp_path / "requeued").exists(), tmp_path)
        assert (tmp_path / "requeued").read_text() == "7\n"
        first = (tmp_path / "logs" / "job-7" / "node-0.log").read_text()
        wait_for(lambda: (tmp_path / "job.log").read_text().count("run ended with status") == 2, tmp_path)
    finally:
        end_job(tmp_path)
    text = (tmp_path / "job.log").read_text()
    assert f"status {REQUEUE_EXIT_CODE};" in text and "status 0;" in text
    stopped_after = int(re.search(r"asked to stop after step (\d+)", first)[1])
    assert 8 <= stopped_after < TOTAL
    assert [s["step"] for s in trained(run)] == list(range(7, TOTAL + 1))
    assert not (run / "metrics.discarded.jsonl").exists()  # no step was done twice
    assert {p.name for p in (tmp_path / "logs" / "job-7").iterdir()} == {"node-0.log", "node-1.log"}
    outputs = [(tmp_path / "logs" / "job-7" / f"node-{node}.log").read_text() for node in (0, 1)]
    assert f"checkpoints/step-{stopped_after}" in outputs[0]
    assert not any("Traceback" in output or "error:" in output for output in outputs), "\n".join(outputs)[-3000:]


def test_a_local_run_on_notice_saves_and_says_so_by_its_status(root: Path) -> None:
    config, run = str(root / "recipe.yaml"), root / "local"
    process = runs.start("train", config, "run.name=local")
    try:
        wait_for(lambda: len(trained(run)) >= 1, root)
        process.send_signal(signal.SIGUSR1)
        output, errors = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            runs.kill(process)
    assert process.returncode == REQUEUE_EXIT_CODE, errors[-3000:]
    last = trained(run)[-1]["step"]
    assert f"asked to stop after step {last}" in output and "Traceback" not in errors and "error:" not in errors
    assert trained(run)[-1]["step"] == last and (run / "checkpoints" / f"step-{last}").is_dir()


def test_a_failing_run_is_not_requeued(root: Path, tmp_path: Path, cluster: dict[str, str]) -> None:
    submit(root, tmp_path, cluster, "run.name=broken", "model.hf_path=/nowhere/model")
    try:
        wait_for(lambda: "run ended with status" in (tmp_path / "job.log").read_text(), tmp_path)
    finally:
        end_job(tmp_path)
    status = re.search(r"ended with status (\d+)", (tmp_path / "job.log").read_text())[1]
    assert status in (
        "1",
        "143",
    )  # srun reports the highest: a node that it ended for the other's failure has 128 + SIGTERM
    assert not (tmp_path / "requeued").exists()
    output = (tmp_path / "logs" / "broken-7" / "node-0.log").read_text()
    assert "/nowhere/model" in output and output.count("error:") == 1 and "Traceback" not in output


def test_servers_on_nodes_of_their_own_live_as_long_as_the_trainer(
    root: Path, tmp_path: Path, cluster: dict[str, str]
) -> None:
    """The servers are real; only the trainer is a few lines."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    cluster["JOB_ID"] = job = str(os.getpid())  # the ports follow from it
    url = f"http://localhost:{20000 + int(job) % 12000 + 1}"
    output = tmp_path / "logs" / f"run-{job}"
    submit(root, tmp_path, cluster, "rollout.mode=server", size="--nodes 1 --cpu-tasks 2 --rollout-nodes 1")
    servers: list[psutil.Process] = []
    try:
        wait_for(lambda: f"healthy: {url}\n" in text_of(output / "node-0.log"), tmp_path)
        servers = psutil.Process(int((tmp_path / "group-1").read_text())).children(recursive=True)
        os.kill(job_pid(tmp_path), signal.SIGUSR1)
        wait_for(lambda: text_of(tmp_path / "job.log").count("run ended with status") == 2, tmp_path)
        servers += [
            p for p in psutil.process_iter() if str(root / "model") in command_of(p)
        ]  # those of the second start
        assert len(servers) >= 2 and not any(process.is_running() for process in servers)
    finally:
        end_job(tmp_path)
        end(servers)
    # the job's token, which the trainer has used, is in neither the script nor a log
    written = [
        path for path in [*tmp_path.rglob("*.log"), *tmp_path.rglob("*.sbatch"), tmp_path / "script"] if path.is_file()
    ]
    assert len(written) >= 5 and not any(re.search("[0-9a-f]{48}", path.read_text()) for path in written)
    statuses = re.findall(r"ended with status (\d+)", text_of(tmp_path / "job.log"))
    assert statuses == [str(REQUEUE_EXIT_CODE), "3"]
    assert (tmp_path / "requeued").read_text() == f"{job}\n"
    printed = text_of(output / "rollout-0.log")
    assert printed.count(" ready after ") == 1 and printed.count("servers ended") == 2 and "Traceback" not in printed
    assert [path.name for path in output.glob("vllm-*.log")] == [
        f"vllm-{socket.gethostname()}-{url.rpartition(':')[2]}.log"
    ]


def submit(
    root: Path, folder: Path, cluster: dict[str, str], *overrides: str, size: str = "--nodes 2 --cpu-tasks 1"
) -> None:
    options = (*size.split(), "--logs", str(folder / "logs"))
    result = runs.reheat("slurm", str(root / "recipe.yaml"), *overrides, *options, timeout_s=60, **cluster)
    assert result.returncode == 0 and f"Submitted batch job {cluster['JOB_ID']}" in result.stdout, result.stderr


def trained(run: Path) -> list[dict]:
    return [s for s in runs.steps_of(run) if s["stage"] != "sft"]


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def job_pid(folder: Path) -> int:
    return int((folder / "job.pid").read_text())


def wait_for(condition: Callable[[], bool], folder: Path, timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            logs = [*folder.glob("job.log"), *folder.glob("logs/*/node-*.log")]
            raise AssertionError("\n".join(f"== {p}\n{p.read_text()[-2000:]}" for p in logs))
        time.sleep(0.05)


def end_job(folder: Path) -> None:
    """Leaves nothing running, whatever the test found."""
    if psutil.pid_exists(job_pid(folder)):
        script = psutil.Process(job_pid(folder))
        end([*script.children(recursive=True), script])


def end(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)
