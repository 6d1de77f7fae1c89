"""Transport and bookkeeping of the weight sync, without an engine process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_reheat.config import RolloutConfig
from megatron_reheat.errors import EngineDied, WeightSyncError
from megatron_reheat.rollout.child_process import ChildProcess
from megatron_reheat.rollout.embedded import EmbeddedEngine
from megatron_reheat.rollout.module_process import PACKAGE_ROOT
from megatron_reheat.rollout.packed import Entry, digest
from megatron_reheat.rollout.weight_buffer import HostBuffer, OpenBuffer
from megatron_reheat.rollout.weight_sync import WeightSync, check_mismatch, mismatch
from megatron_reheat.rollout.wire import SampleReply, SampleRequest
from megatron_reheat.types import SamplingParams


@pytest.fixture
def buffer():
    shared = HostBuffer(4096)
    yield shared
    shared.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4)])
def test_a_second_mapping_reads_what_the_first_wrote(buffer, dtype, shape):
    tensor = torch.randn(shape).to(dtype)
    entry = buffer.write("weight", tensor, 128, verify=True)
    other = OpenBuffer(buffer.source)
    received = other.read(entry)
    assert torch.equal(received, tensor)
    assert digest("weight", received) == entry.digest
    assert other.holds(received) and not other.holds(tensor)


def test_non_contiguous_source_arrives_in_logical_order(buffer):
    tensor = torch.arange(12.0).view(3, 4).t()
    entry = buffer.write("weight", tensor, 0, verify=True)
    received = OpenBuffer(buffer.source).read(entry)
    assert torch.equal(received, tensor)
    assert digest("weight", received) == entry.digest


def test_after_growing_the_other_end_has_to_open_it_again(buffer):
    entry = buffer.write("a", torch.arange(8.0), 0, verify=False)
    other = OpenBuffer(buffer.source)
    buffer.grow(8192)
    late = buffer.write("b", torch.ones(16), 8000, verify=False)
    with pytest.raises(WeightSyncError, match=r"b ends beyond the 4096 bytes"):
        other.read(late)
    assert torch.equal(other.read(entry), torch.arange(8.0))
    assert torch.equal(OpenBuffer(buffer.source).read(late), torch.ones(16))


def test_non_float_tensors_are_refused(buffer):
    for dtype in ("int64", "rubbish"):
        with pytest.raises(WeightSyncError, match=f"a has dtype {dtype}"):
            OpenBuffer(buffer.source).read(Entry("a", dtype, (2,), 0))


def test_digest_sees_one_bit_the_name_the_dtype_and_the_shape():
    tensor = torch.randn(4, 6)
    flipped = tensor.clone()
    flipped.view(torch.uint8)[0, 0] ^= 1
    variants = [
        digest("a", tensor),
        digest("a", flipped),
        digest("b", tensor),
        digest("a", tensor.view(6, 4)),
        digest("a", tensor.view(torch.int32)),
    ]
    assert len(set(variants)) == len(variants)
    assert digest("a", tensor.clone()) == variants[0]


def test_a_rank_without_engine_drains_the_tensors():
    seen = []

    def tensors():
        for i in range(3):
            seen.append(i)
            yield f"w{i}", torch.zeros(10)

    report = WeightSync(None, RolloutConfig()).push(tensors(), version=4)
    assert seen == [0, 1, 2]
    assert (report.version, report.num_tensors, report.num_bytes, report.verified) == (4, 3, 120, False)


def test_mismatch_of_equal_logprobs_is_zero():
    logprobs = np.log(np.array([0.5, 0.1, 0.9], dtype=np.float32))
    assert mismatch(logprobs, logprobs) == {"mismatch_kl": 0.0, "mismatch_abs_mean": 0.0, "mismatch_abs_max": 0.0}
    empty = np.zeros(0, dtype=np.float32)
    assert mismatch(empty, empty)["mismatch_kl"] == 0.0


def test_mismatch_kl_is_the_kl_of_engine_to_trainer():
    # tokens in exactly the engine's proportions, so the estimate has no sampling error
    engine = np.array([0.5, 0.25, 0.25])
    trainer = np.array([0.25, 0.25, 0.5])
    tokens = np.array([0, 0, 1, 2])
    result = mismatch(np.log(engine)[tokens].astype(np.float32), np.log(trainer)[tokens].astype(np.float32))
    assert result["mismatch_kl"] == pytest.approx(float(np.sum(engine * np.log(engine / trainer))), abs=1e-6)
    assert result["mismatch_abs_mean"] == pytest.approx(0.75 * np.log(2), abs=1e-6)
    assert result["mismatch_abs_max"] == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize("value", [0.2, float("nan"), float("inf")])
def test_check_mismatch_stops_the_run(value):
    check_mismatch(0.1, 0.1, policy_version=3)
    with pytest.raises(WeightSyncError, match=r"policy version 3 .* rollout.mismatch_limit 0.1"):
        check_mismatch(value, 0.1, policy_version=3)


def test_huge_disagreement_is_reported_not_overflowed_away():
    result = mismatch(np.array([-2000.0], dtype=np.float32), np.array([0.0], dtype=np.float32))
    with pytest.raises(WeightSyncError, match="mismatch_kl inf"):
        check_mismatch(result["mismatch_kl"], 0.1, policy_version=1)


def test_samples_survive_the_wire():
    params = SamplingParams(temperature=0.7, max_tokens=5, stop_token_ids=(1,))
    prompts = [np.array(p, dtype=np.int32) for p in ([3, 4], [5], [6, 7, 8])]
    request = SampleRequest.pack(prompts, params, n=2, seed=9)
    assert request.prompts() == [[3, 4], [5], [6, 7, 8]]
    reply = SampleReply(
        places=np.array([3, 0, 1, 2], dtype=np.int32),
        token_ids=np.arange(7, dtype=np.int32),
        logprobs=-np.arange(7, dtype=np.float32),
        lengths=np.array([1, 2, 3, 1], dtype=np.int32),
        stopped=np.array([True, False, False, True]),
        policy_version=11,
    )
    places, completions = zip(*reply.unpack(sampling_temperature=0.7), strict=True)
    assert places == (3, 0, 1, 2)
    assert [c.token_ids.tolist() for c in completions] == [[0], [1, 2], [3, 4, 5], [6]]
    assert [c.finish_reason for c in completions] == ["stop", "length", "length", "stop"]
    assert completions[2].rollout_logprobs.tolist() == [-3.0, -4.0, -5.0]
    assert {c.policy_version for c in completions} == {11}


def test_completions_that_are_asked_for_apart_have_the_seeds_that_vllm_gives_them_together():
    params, prompts = SamplingParams(temperature=1.0, max_tokens=5), [np.array([3], dtype=np.int32)] * 2
    together, apart = (SampleRequest.pack(prompts, params, n=3, seed=9, apart=apart) for apart in (False, True))
    assert (together.samples, apart.samples) == (3, 1)
    # vLLM gives sample i of a request the request's seed + i
    children = [together.seed_of(place) + i for place in (0, 3) for i in range(3)]
    assert [apart.seed_of(place) for place in range(6)] == children and len(set(children)) == 6
    greedy = SampleRequest.pack(prompts, SamplingParams(temperature=0.0, max_tokens=5), n=1, seed=9)
    assert greedy.seed_of(0) is None


def test_neighbouring_seeds_do_not_share_streams():
    params = SamplingParams(temperature=1.0, max_tokens=1)
    prompts = [np.array([1], dtype=np.int32)] * 512
    bases = sorted(SampleRequest.pack(prompts, params, n=8, seed=s).base_seed for s in range(50))
    assert all(0 <= b < 2**32 for b in bases)
    assert min(np.diff(bases)) > 512 * 8


@pytest.fixture
def start_child(tmp_path):
    """Starts a child that runs the given program instead of an engine."""
    children = []

    def start(program: str) -> ChildProcess:
        (tmp_path / "program.py").write_text(program)
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        children.append(ChildProcess("program", [], env=env, log_file=tmp_path / "logs" / "child.log"))
        return children[-1]

    yield start
    for child in children:
        child.end()
        child.end()
        assert not child.alive


def test_a_child_that_dies_at_start_is_reported_with_its_log(start_child):
    child = start_child("import sys; print('no such model'); sys.exit(7)")
    with pytest.raises(EngineDied, match=rf"engine process {child.pid} exited with code 7 during 'start'") as caught:
        child.receive(0, "start", timeout_s=60, timeout_key="rollout.start_timeout_s")
    assert "no such model" in str(caught.value) and "child.log" in str(caught.value)


def test_a_child_that_never_answers_is_killed(start_child):
    child = start_child("import time; time.sleep(600)")
    with pytest.raises(EngineDied, match=r"did not answer 'start' within 0.3 s \(rollout.start_timeout_s\)"):
        child.receive(0, "start", timeout_s=0.3, timeout_key="rollout.start_timeout_s")
    assert not child.alive


def test_a_child_that_stops_in_the_middle_of_an_answer_is_killed(start_child):
    child = start_child("import os, sys, time; os.write(int(sys.argv[1]), b'\\0\\0\\1\\0half'); time.sleep(600)")
    with pytest.raises(EngineDied, match="did not answer 'start' within 2 s"):
        child.receive(0, "start", timeout_s=2, timeout_key="rollout.start_timeout_s")
    assert not child.alive


def test_a_child_that_takes_no_requests_is_killed(start_child):
    child = start_child("import time; time.sleep(600)")
    with pytest.raises(EngineDied, match=r"did not answer 'load' within 0.3 s"):
        child.send("load", bytes(8 << 20), timeout_s=0.3)
    assert not child.alive


def test_answers_to_interrupted_requests_are_dropped(start_child):
    child = start_child(
        "import sys\n"
        "from multiprocessing.connection import Connection\n"
        "socket = Connection(int(sys.argv[1]))\n"
        "while True:\n"
        "    number, operation, arguments = socket.recv()\n"
        "    if operation == 'exit':\n"
        "        break\n"
        "    socket.send((number, operation))\n"
    )
    child.send("interrupted", timeout_s=30)
    assert child.call("wanted", timeout_s=30, timeout_key="rollout.timeout_s") == "wanted"


def test_an_engine_dies_with_its_trainer(tmp_path):
    (tmp_path / "program.py").write_text(
        "import sys, time\n"
        "from megatron_reheat.processes import die_with_parent\n"
        "die_with_parent(int(sys.argv[2]), 'trainer')\n"
        "print('guarded', flush=True)\n"
        "time.sleep(600)\n"
    )
    trainer = (
        "import os, time\n"
        "from pathlib import Path\n"
        "from megatron_reheat.rollout.child_process import ChildProcess\n"
        "child = ChildProcess('program', [], env=os.environ, log_file=Path('log'))\n"
        "while 'guarded' not in Path('log').read_text():\n"
        "    assert child.alive\n"
        "    time.sleep(0.02)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(PACKAGE_ROOT)])}
    command = [sys.executable, "-c", trainer]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            pid = int(process.stdout.readline())
            assert _running(pid)
        finally:
            process.kill()
    deadline = time.monotonic() + 30
    while _running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _running(pid)


@pytest.mark.parametrize("has_engine", [False, True])
def test_no_tensor_is_held_when_what_comes_behind_the_last_one_runs(buffer, has_engine: bool) -> None:
    """There a rank gives back memory, of which a gathered head can be more than all else."""
    held: list[bool] = []

    def tensors():
        head = torch.ones(3)
        seen = weakref.ref(head)
        yield "lm_head.weight", head
        del head
        held.append(seen() is not None)

    if has_engine:
        engine: Any = SimpleNamespace(_buffer=buffer, _announce=lambda portion: None)
        EmbeddedEngine._stream(engine, tensors(), verify=False)
    else:
        assert WeightSync(None, RolloutConfig()).push(tensors(), 3).num_bytes == 12
    assert held == [False]


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
