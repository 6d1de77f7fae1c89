"""MLflow and trackio, by their real clients and stores on this machine. W&B and TensorBoard: test_run_folder."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_reheat.errors import ReheatError
from megatron_reheat.run_folder import RunFolder
from megatron_reheat.run_logger import RunLogger
from megatron_reheat.trackers import MLflow
from tests.e2e.runs import ROOT
from tests.unit.test_run_folder import log_steps, make_config, record

SECRET = "hf_" + "a" * 34
RUN = {"run": {"name": "trial", "steps": 10}}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of an empty store: in SQLite with the whole package, in files with its client alone."""
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    if importlib.util.find_spec("sqlalchemy") is None:
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions refuse files unless they are asked for
        uri = f"file:{tmp_path / 'store'}"
    else:
        uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    from mlflow import MlflowClient

    return MlflowClient(uri)


def the_run(store: Any) -> Any:
    (experiment,) = (e for e in store.search_experiments() if e.name == "reheat")
    (run,) = store.search_runs([experiment.experiment_id])
    return run


def steps_of(store: Any, name: str = "entropy/mean") -> list[int]:
    return [metric.step for metric in store.get_metric_history(the_run(store).info.run_id, name)]


def test_mlflow_has_the_run_and_goes_on_with_it(store: Any, tmp_path: Path) -> None:
    logging = {"mlflow_experiment": "reheat", "wandb_project": None}
    options = {"data": {"path": "a.jsonl", "options": {"token": SECRET}}}
    run = log_steps(tmp_path / "run", range(1, 4), logging=logging, **RUN, **options)
    found = the_run(store)
    assert found.info.status == "FINISHED" and found.info.run_name == "trial"
    assert (run.path / "mlflow_id").read_text() == found.info.run_id
    assert steps_of(store) == [1, 2, 3] and found.data.metrics["policy_version"] == 3
    assert found.data.tags["stage"] == "rlvr"
    params = found.data.params
    assert params["run.steps"] == "10" and params["data.options.token"] == "***" and SECRET not in json.dumps(params)
    assert len(params) > 100
    changed = {"run": {"name": "trial", "steps": 20}}
    log_steps(tmp_path / "run", range(4, 6), start_step=3, logging=logging, **changed, **options)
    found = the_run(store)
    assert steps_of(store) == [1, 2, 3, 4, 5]
    assert found.data.params["run.steps"] == "10" and found.data.tags["changed/run.steps"] == "20"


def test_mlflow_has_events_and_a_crash(store: Any, tmp_path: Path) -> None:
    config = make_config(logging={"mlflow_experiment": "reheat"}, **RUN)
    for number in (1, 2):
        with (
            pytest.raises(ZeroDivisionError),
            RunLogger(config, RunFolder(tmp_path / "run"), is_main=True, start_step=2 * number - 2) as logger,
        ):
            logger.log_step(record(2 * number - 1, event="entering reheat"))
            assert the_run(store).info.status == "RUNNING"
            logger.log_event("second")
            raise ZeroDivisionError
        assert the_run(store).info.status == "FAILED"
    assert the_run(store).data.tags["event/000001"] == "entering reheat\nsecond"
    assert the_run(store).data.tags["event/000003"] == "entering reheat\nsecond"


def test_mlflow_gets_later_what_it_missed(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("gone")

    config = make_config(logging={"mlflow_experiment": "reheat"}, **RUN)
    tracker = MLflow(config, RunFolder(tmp_path))
    tracker.step(record(1), {"entropy/mean": 0.5})
    with monkeypatch.context() as patch:
        patch.setattr(tracker._client, "log_batch", refuse)
        for step in (2, 3):
            tracker.step(record(step), {"entropy/mean": 0.5})
        tracker.event(3, "alone")
    assert (
        capsys.readouterr().err.count("note: MLflow does not take the metrics now (gone); they are in metrics.jsonl")
        == 1
    )
    assert steps_of(store) == [1]
    tracker.close(0)
    assert steps_of(store) == [1, 2, 3] and the_run(store).data.tags["event/000003"] == "alone"


def test_a_server_that_is_not_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{unused.getsockname()[1]}")
    with pytest.raises(
        ReheatError, match=r"^MLflow refused to start: .*; set MLFLOW_TRACKING_URI to a server's"
    ) as refused:
        log_steps(tmp_path, range(1, 2), logging={"mlflow_experiment": "reheat"})
    assert "\n" not in str(refused.value)


def test_a_run_that_mlflow_does_not_know_is_one_sentence(store: Any, tmp_path: Path) -> None:
    (tmp_path / "mlflow_id").write_text("0" * 32)
    with pytest.raises(ReheatError, match=r"^MLflow refused to start, which .*mlflow_id names: .*0000.*; set MLFLOW"):
        log_steps(tmp_path, range(1, 2), logging={"mlflow_experiment": "reheat"})


TRACKIO = """
import sys, pathlib
from megatron_reheat.run_folder import RunFolder
from megatron_reheat.run_logger import RunLogger
from tests.unit.test_run_folder import make_config, record
first, last, fails = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "fails"
config = make_config(logging={"trackio_project": "reheat"}, run={"name": "trial"})
with RunLogger(config, RunFolder(pathlib.Path(sys.argv[1])), is_main=True, start_step=first - 1) as logger:
    for step in range(first, last + 1):
        logger.log_step(record(step, event="entering reheat" if step == 2 else None))
    if fails:
        raise SystemExit(7)
"""
READ = """
import json
from trackio.sqlite_storage import SQLiteStorage as store
(run,) = store.get_runs("reheat")
config, alerts = store.get_run_config("reheat", run), store.get_alerts("reheat")
print(json.dumps({"run": run, "logs": store.get_logs("reheat", run), "config": config, "alerts": alerts}))
"""


def test_trackio_has_the_run_and_goes_on_with_it(tmp_path: Path) -> None:
    """In processes of their own: where it keeps runs is settled when it is imported."""
    pytest.importorskip("trackio", reason="trackio is not installed")
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "store"), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}

    def python(*arguments: str, status: int = 0) -> str:
        command = [sys.executable, "-W", "ignore", "-c", *arguments]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, done.stderr
        return done.stdout

    folder = str(tmp_path / "run")
    python(TRACKIO, folder, "1", "3", "ends")
    name = (tmp_path / "run" / "trackio_id").read_text()
    python(TRACKIO, folder, "4", "5", "fails", status=7)
    found = json.loads(python(READ).splitlines()[-1])
    assert found["run"] == f"trial-{name}"
    rows = [row for row in found["logs"] if "entropy/mean" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and {row["stage"] for row in rows} == {"rlvr"}
    assert [row["event"] for row in found["logs"] if row["step"] == 2 and "event" in row] == ["entering reheat"]
    assert found["config"]["run"]["name"] == "trial"
    assert [(alert["title"], alert["level"], alert["step"]) for alert in found["alerts"]] == [("FAILED", "error", 5)]
