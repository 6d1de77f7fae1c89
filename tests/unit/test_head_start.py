"""An engine's process that is started before anything is known: when it is, who gets it, and where it prints."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from megatron.core.parallel_state import RankGenerator

from megatron_reheat.errors import EngineDied
from megatron_reheat.recipe import parse_config
from megatron_reheat.rollout import head_start as module
from megatron_reheat.rollout.child_process import ChildProcess
from megatron_reheat.rollout.head_start import HeadStart
from tests.unit.test_config import recipe

# prints, and then does with its output what `engine_process` does once it is told
PROGRAM = """
import sys
from multiprocessing.connection import Connection
from megatron_reheat.rollout.engine_process import _print_to
socket = Connection(int(sys.argv[1]))
print("early", flush=True)
_print_to(socket.recv())
print("late", flush=True)
socket.send((0, "ready"))
socket.recv()
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is started in place of an engine."""
    monkeypatch.setattr(module, "WORKER_MODULE", "program")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    (path := tmp_path / "program.py").write_text(PROGRAM)
    return path


def start(tmp_path: Path, world_size: int = 1, **sections: Any) -> HeadStart:
    tree = recipe(run={"folder": str(tmp_path / "run"), "steps": 3}, **sections)
    return HeadStart(parse_config(tree), world_size)


def expected(**sections: Any) -> dict[str, str]:
    return module._expected_variables(parse_config(recipe(**sections)))


def taken(waiting: HeadStart, log: Path, *arguments: str, **changes: str) -> ChildProcess | None:
    return waiting.take(arguments, {**waiting._variables, **changes}, log)


def test_who_asks_for_the_same_gets_it_with_all_that_it_printed(program: Path, tmp_path: Path) -> None:
    log = tmp_path / "run" / "logs" / "vllm-0.log"
    with start(tmp_path) as waiting:
        assert not log.parent.exists()  # a run that is refused leaves nothing behind
        child = taken(waiting, log)
        assert child is not None and waiting.take([], waiting._variables, log) is None
        child.send_settings(str(log), 30)
        assert child.receive(0, "start", timeout_s=60, timeout_key="") == "ready"
        assert child.alive and log.read_text().splitlines()[::2] == ["early", "late"]
        child.kill()
        with pytest.raises(EngineDied) as caught:
            child.receive(1, "generate", timeout_s=60, timeout_key="")
    assert str(caught.value).count("early") == log.read_text().count("early") == 1  # taken over, not copied
    child.end()


def test_what_it_printed_before_it_died_is_in_the_message(program: Path, tmp_path: Path) -> None:
    program.write_text("import sys, time; print('no such library', flush=True); time.sleep(0.5); sys.exit(7)")
    log = tmp_path / "engine.log"
    with start(tmp_path) as waiting:
        child = taken(waiting, log)
        assert child is not None
        with pytest.raises(EngineDied, match="exited with code 7 during 'start'") as caught:
            child.receive(0, "start", timeout_s=60, timeout_key="")
    assert "no such library" in str(caught.value) and log.read_text() == "no such library\n"
    child.end()


@pytest.mark.parametrize("arguments", [("0,1",), ()])
def test_who_asks_for_something_else_does_not(arguments: tuple[str, ...], program: Path, tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    with start(tmp_path) as waiting:
        child = waiting._child
        changes = {} if arguments else {"OMP_NUM_THREADS": "77"}
        assert child is not None and taken(waiting, log, *arguments, **changes) is None
        assert not child.alive and not log.exists()


def test_what_nobody_took_is_ended(program: Path, tmp_path: Path) -> None:
    with start(tmp_path) as waiting:
        child = waiting._child
        assert child is not None and child.alive
    assert not child.alive


def test_no_engine_process_no_head_start(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(tmp_path, rollout={"mode": "server"}) as waiting:
        assert waiting._child is None
    monkeypatch.setenv("RANK", "1")
    with start(tmp_path, 2, parallel={"tensor": 2}) as waiting:
        assert waiting._child is None
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "run" / "checkpoints" / "step-3").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-3")
    monkeypatch.setattr(module.RunFolder, "saved_step", 3)
    with start(tmp_path) as waiting:
        assert waiting._child is None  # nothing is left to do


def test_a_machine_that_starts_no_process_says_so_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path))
    with start(tmp_path) as waiting:
        assert taken(waiting, tmp_path / "engine.log") is None


SIZES = list(itertools.product((1, 2), (1, 2), (1, 2, 3), (1, 2)))


@pytest.mark.parametrize(("tensor", "context", "data", "pipeline"), SIZES)
def test_it_is_for_the_first_rank_of_each_replica(
    tensor: int, context: int, data: int, pipeline: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each copy of the model, of which the context ranks of a micro-batch have one each."""
    ranks = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=context, order="tp-cp-ep-dp-pp")
    leaders = {min(replica) for replica in ranks.get_ranks("tp-pp")}
    parallel = {"tensor": tensor, "context": context, "pipeline": pipeline, "data": data}
    world_size, found = tensor * context * data * pipeline, set()
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        if start(tmp_path, world_size, parallel=parallel)._holds_engine():
            found.add(rank)
    assert found == leaders


def test_the_environment_is_what_an_engine_of_the_run_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica's share of the cores, and its devices by the names of the environment."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    env = expected(parallel={"tensor": 2, "data": 2})
    assert env["OMP_NUM_THREADS"] == "4" and "CUDA_VISIBLE_DEVICES" not in env
    monkeypatch.setattr(module, "has_gpus", lambda: True)
    colocated = {"mode": "colocated", "tensor": 2}
    assert expected(rollout=colocated)["CUDA_VISIBLE_DEVICES"] == "2,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7, 5,MIG-a,3")
    assert expected(rollout=colocated)["CUDA_VISIBLE_DEVICES"] == "MIG-a,3"


@pytest.mark.parametrize(("names", "expected"), [(["nvidiactl", "null"], False), (["nvidiactl", "nvidia4"], True)])
def test_some_of_a_machines_gpus(
    names: list[str], expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container has them under the machine's numbers."""
    for name in names:
        (tmp_path / name).touch()
    monkeypatch.setattr(module, "DEVICES", tmp_path)
    assert module.has_gpus() == expected


def test_it_starts_before_torch_is_imported() -> None:
    """Else it would be no head start."""
    early = "import megatron_reheat.commands.train, megatron_reheat.rollout.head_start"
    code = f"import sys; {early}; assert 'torch' not in sys.modules"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0
