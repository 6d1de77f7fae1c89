"""Ctrl-C: the first finishes the step in progress and saves, the second ends everything at once. Nothing is left running.

SIGINT goes to the whole process group, as a terminal sends it; ranks and engines are sessions of their own and do not get it.
SIGTERM is the same notice, here to all processes of the run, as systemd and some of Slurm's plugins send it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from megatron_reheat.stop_request import REQUEUE_EXIT_CODE
from tests.e2e import runs

STOPPED_STATUS = 128 + signal.SIGINT
AT_ONCE_S = 10.0
FIRST = "stopping after the step in progress"
AGAIN = "; Ctrl-C again stops at once\n"
GRACE = "; at the latest 600 s from now (run.stop_grace_s)\n"
NOTHING_SAVED = "asked to stop before the first step; nothing is saved yet, the same command starts anew"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("interrupts")
    runs.make_model_folder(root / "model")
    tree = runs.recipe(root / "model", root)
    tree["checkpoint"]["every"] = 0  # what is saved is saved because of the Ctrl-C
    runs.write_recipe({**tree, "eval": {}, "run": {**tree["run"], "steps": 500}}, root / "recipe.yaml")
    return root


def press_ctrl_c(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)


def processes_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def engines(processes: list[psutil.Process]) -> int:
    return sum(p.name().startswith("vllm-") for p in processes)


def ended(process: subprocess.Popen[str], started: list[psutil.Process]) -> tuple[str, str]:
    """What it printed, once it and all that it had started are gone."""
    try:
        output, errors = process.communicate(timeout=runs.LIMIT_S)
        _, alive = psutil.wait_procs(started, timeout=AT_ONCE_S)
        assert alive == []
    finally:
        for left in started:
            if left.is_running():
                left.kill()
    return output, errors


def trained(run: Path) -> list[dict]:
    return [s for s in runs.steps_of(run) if s["stage"] != "sft"]


def check_saved(run: Path, output: str) -> None:
    last = trained(run)[-1]["step"]
    assert f"asked to stop after step {last}; the same command goes on from there" in output
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"latest", f"step-{last}"}


def test_two_ranks_save_at_sigterm_and_stop_at_the_second_ctrl_c(root: Path) -> None:
    run = root / "two"
    process = runs.start("train", str(root / "recipe.yaml"), "run.name=two")
    runs.wait_for(lambda: len(trained(run)) >= 1, process)
    started = processes_of(process)
    assert engines(started) == 2
    for one in started:
        one.terminate()
    output, errors = ended(process, started)
    assert (process.returncode, errors) == (REQUEUE_EXIT_CODE, FIRST + GRACE), errors[-3000:]
    check_saved(run, output)
    assert {s["rollout/engine_restarts"] for s in trained(run)} == {0}
    last = trained(run)[-1]["step"]

    process = runs.start("train", str(root / "recipe.yaml"), "run.name=two")
    runs.wait_for(lambda: engines(processes_of(process)) == 2, process)  # its start takes several seconds more
    started = processes_of(process)
    press_ctrl_c(process)
    time.sleep(0.5)
    assert process.poll() is None
    press_ctrl_c(process)
    pressed = time.monotonic()
    _, errors = ended(process, started)
    assert time.monotonic() - pressed < AT_ONCE_S
    second = f"error: stopped by SIGINT; the same command goes on from step {last}, the latest that is saved\n"
    assert (process.returncode, errors) == (STOPPED_STATUS, FIRST + AGAIN + second)


def test_a_rank_that_is_stopped_ends_the_run_with_one_message(root: Path) -> None:
    code = """
import sys
from megatron_reheat import cli
from megatron_reheat.cluster import launch
launch.STOPPED_LIMIT_S = 1
sys.exit(cli.main(sys.argv[1:]))
"""
    recipe = str(root / "recipe.yaml")
    process = runs.start_python("-c", code, "train", recipe, "run.name=stuck")
    runs.wait_for(lambda: "rank 1" in [p.name() for p in processes_of(process)], process)
    started = processes_of(process)
    stuck = next(p for p in started if p.name() == "rank 1")
    stuck.suspend()
    _, errors = ended(process, started)
    assert (process.returncode, errors) == (
        1,
        f"error: rank 1 (process {stuck.pid}) had been stopped (SIGSTOP) for 1 s and was ended, and the others with it; "
        "nothing is saved yet, the same command starts anew\n",
    )


def test_before_the_first_step_nothing_is_saved_and_it_says_so(root: Path) -> None:
    process = runs.start("train", str(root / "recipe.yaml"), "run.name=early")
    runs.wait_for(lambda: len(processes_of(process)) == 2, process)  # launcher and fork server import
    started = processes_of(process)
    press_ctrl_c(process)
    output, errors = ended(process, started)
    assert (process.returncode, errors) == (REQUEUE_EXIT_CODE, FIRST + AGAIN), errors[-3000:]
    assert output.endswith(NOTHING_SAVED + "\n") and not (root / "early").exists()  # no engine was started for it


def test_an_evaluation_is_finished_first(root: Path) -> None:
    """One process without torchrun, in the evaluation before the first step."""
    held_out = {**runs.COUNTDOWN, "size": 10, "seed": 2}
    tree = {"base": str(root / "recipe.yaml"), "eval": {"data": held_out, "num_samples": 512, "max_tokens": 8}}
    recipe = runs.write_recipe(tree, root / "evaluated.yaml")
    process = runs.start("train", str(recipe), "run.name=evaluated", "parallel.data=1", "sft.steps=0")
    for line in process.stdout:  # the last line of the start; the evaluation follows and takes seconds
        if "first weight sync" in line:
            break
    started = processes_of(process)
    press_ctrl_c(process)
    output, errors = ended(process, started)
    assert (process.returncode, errors) == (REQUEUE_EXIT_CODE, FIRST + AGAIN), errors[-3000:]
    (step,) = runs.steps_of(root / "evaluated")
    assert step["step"] == 0 and "eval/avg_at_k" in step
    assert NOTHING_SAVED in output and not any((root / "evaluated" / "checkpoints").iterdir())


def test_ranks_under_a_torchrun_of_the_users(root: Path) -> None:
    """It sends its ranks SIGINT and waits for 30 s; what it prints and returns for itself is torchrun's."""
    run = root / "torchrun"
    process = runs.start_torchrun("train", str(root / "recipe.yaml"), "run.name=torchrun")
    runs.wait_for(lambda: len(trained(run)) >= 1, process)
    started = processes_of(process)
    press_ctrl_c(process)
    output, errors = ended(process, started)
    check_saved(run, output)
    assert errors.count(f"{FIRST}, if torchrun waits so long (its --shutdown-timeout, 30 s by default){AGAIN}") == 1

    process = runs.start_torchrun("train", str(root / "recipe.yaml"), "run.name=torchrun")
    runs.wait_for(lambda: engines(processes_of(process)) == 2, process)
    started = processes_of(process)
    process.kill()  # as nobody can help: its ranks would train on
    ended(process, started)


def test_an_evaluation_of_suites_finishes_the_suite_it_is_in(root: Path) -> None:
    suites = [f"reasoning_gym:chain_sum:{{max_terms: {terms}, size: 8}}" for terms in (3, 4, 5)]
    options = ["--template", "{answer}=", "--n", "512", "--max-tokens", "16", "--engine", "kv_cache_mb=32", "threads=1"]
    command = ["eval", str(root / "model"), "--suite", *suites, *options, "--out", str(root / "suites")]
    process = runs.start(*command)
    first_line = process.stdout.readline()
    assert "8 problems x 512 samples" in first_line
    time.sleep(0.2)  # into the second, which takes seconds
    started = processes_of(process)
    press_ctrl_c(process)
    output, errors = ended(process, started)
    done = 1 + output.count("8 problems x 512 samples")
    assert done < 3 and len(json.loads((root / "suites" / "results.json").read_text())["suites"]) == done
    assert process.returncode == STOPPED_STATUS
    assert errors == f"stopping after the suite in progress{AGAIN}" + (
        f"error: stopped by request after {done} of 3 suites, which are in results.json\n"
    )

    process = runs.start(*command)
    runs.wait_for(lambda: engines(processes_of(process)) == 1, process)
    started = processes_of(process)
    press_ctrl_c(process)
    time.sleep(0.5)
    press_ctrl_c(process)
    _, errors = ended(process, started)
    assert process.returncode == STOPPED_STATUS
    assert errors.endswith("error: stopped by SIGINT before a suite was finished; nothing is saved\n")
