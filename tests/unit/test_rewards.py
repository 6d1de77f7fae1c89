"""Graders, and a pool that survives whatever they do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_reheat.config import RewardConfig
from megatron_reheat.errors import ReheatError
from megatron_reheat.rewards.math import last_boxed, verify_math
from megatron_reheat.rewards.pool import VerifierPool, _worker_environment
from megatron_reheat.rewards.reasoning_gym import verify_reasoning_gym
from megatron_reheat.types import Reward

RIGHT = Reward(1.0, correct=True)
WRONG = Reward(-1.0, correct=False)
LOST = Reward(-1.0, correct=False, timed_out=True)

HANGS = "9**9**9**9"
DIES = "__import__('os')._exit(3)"


def countdown(numbers: list[int], target: int) -> dict:
    entry = {"question": "", "answer": None, "metadata": {"numbers": numbers, "target": target}}
    return {"task": "countdown", "entry": entry}


SUM_22 = countdown([11, 4, 7], 22)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid: int, patience_s: float = 60.0) -> bool:
    give_up = time.monotonic() + patience_s
    while is_running(pid) and time.monotonic() < give_up:
        time.sleep(0.05)
    return not is_running(pid)


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(RewardConfig(kind="reasoning_gym", workers=2, timeout_s=3.0, incorrect=-1.0)) as pool:
        yield pool


@pytest.fixture(autouse=True)
def no_counts_left_over(request: pytest.FixtureRequest) -> None:
    if "pool" in request.fixturenames:
        shared = request.getfixturevalue("pool")
        shared.timeouts = shared.restarts = shared.errors = 0


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        (r"Hence \boxed{42}.", "42", True),
        (r"Hence \boxed{41}.", "42", False),
        (r"\boxed{1}, no: \boxed{42}", "42", True),
        (r"\boxed{42}, no: \boxed{1}", "42", False),
        (r"\boxed{42}, no: \boxed{\frac{}", "42", False),
        (r"\boxed{0.5}", r"\frac{1}{2}", True),
        (r"\boxed{\dfrac{1}{2}}", "$1/2$", True),
        (r"\boxed{\{2, 1\}}", r"\{1, 2\}", True),
        (r"\boxed{1+x}", r"so it is \boxed{x+1}", True),
        (r"\boxed{72}", "48 / 2 = 24 and 48 + 24 = 72\n#### 72", True),
        (r"\boxed{24}", "48 / 2 = 24 and 48 + 24 = 72\n#### 72", False),
        (r"\boxed {1{,}000}", "1000", True),
        ("the answer is 42", "42", False),
        (r"\boxed{42", "42", False),
        (r"\boxed{}", "42", False),
        (r"\boxed{\frac{@#}", "42", False),
        ("", "42", False),
    ],
)
def test_math_answers(response: str, answer: str, correct: bool) -> None:
    assert verify_math(response, {"answer": answer}) == float(correct)


def test_last_boxed_skips_escaped_braces() -> None:
    assert last_boxed(r"\boxed{\left\{ a \right.} and }") == r"\left\{ a \right."
    assert last_boxed("none") is None


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        ("7 + 4 + 11", True),
        ("  11+7+4\n", True),
        ("I try <answer>7*4</answer>, better <answer> 4+11+7 </answer> done", True),
        ("4+7+11 <answer>7*4</answer>", False),
        ("7*4*11", False),
        ("7+4", False),
        ("22", False),
        ("", False),
        ("  \n", False),
        ("<answer></answer>", False),
        ("((7+", False),
    ],
)
def test_countdown_answers(response: str, correct: bool) -> None:
    assert verify_reasoning_gym(response, SUM_22) == float(correct)


def test_pool_keeps_the_order_and_maps_values(pool: VerifierPool) -> None:
    sums = [countdown([n, 1], n + 1) for n in range(2, 102)]
    items = [(f"{n}+1" if n % 3 else f"{n}*1", verifier) for n, verifier in enumerate(sums, start=2)]
    assert pool.grade(items) == [RIGHT if n % 3 else WRONG for n in range(2, 102)]
    assert len(pool.worker_pids) == 2
    assert (pool.timeouts, pool.restarts, pool.errors) == (0, 0, 0)
    assert pool.grade([]) == []


def test_equal_texts_share_a_grade_only_within_one_verifier(pool: VerifierPool) -> None:
    other = countdown([11, 4, 7], 23)
    items = [("4+7+11", SUM_22), ("4+7+11", other), (" 4+7+11\n", SUM_22), ("4+7+11", other)]
    assert pool.grade(items) == [RIGHT, WRONG, RIGHT, WRONG]


def test_a_hanging_grader_is_killed_once_and_others_survive(pool: VerifierPool) -> None:
    pool.grade([("4+7+11", SUM_22), ("1", SUM_22)])
    before = set(pool.worker_pids)
    others = [(f"{n}+22-{n}", SUM_22) for n in range(40)]
    rewards = pool.grade([(HANGS, SUM_22), *others, (HANGS, SUM_22), ("4+7+11", SUM_22)])
    assert rewards == [LOST, *[WRONG] * 40, LOST, RIGHT]
    assert (pool.timeouts, pool.restarts) == (1, 1)
    killed = before - set(pool.worker_pids)
    assert len(killed) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(killed.pop(), 0)


def test_a_grader_that_ends_its_process_costs_only_its_item(pool: VerifierPool) -> None:
    assert pool.grade([("4+7+11", SUM_22), (DIES, SUM_22), ("7+4+11", SUM_22)]) == [RIGHT, LOST, RIGHT]
    assert (pool.timeouts, pool.restarts) == (0, 1)


def test_memory_is_limited_and_side_effects_are_refused(pool: VerifierPool, tmp_path: Path) -> None:
    target = tmp_path / "written"
    hostile = [
        "[0]*10**11",
        f"open('{target}', 'w')",
        f"__import__('os').system('touch {target}')",
        f"__import__('os').kill({os.getpid()}, 0) or 22",
    ]
    assert pool.grade([(text, SUM_22) for text in hostile]) == [WRONG] * len(hostile)
    assert not target.exists()
    assert (pool.timeouts, pool.restarts) == (0, 0)


def test_a_worker_that_died_between_batches_costs_nothing(pool: VerifierPool) -> None:
    pool.grade([("4+7+11", SUM_22), ("1", SUM_22)])
    for pid in pool.worker_pids:
        os.kill(pid, signal.SIGKILL)
        assert ends(pid)
    assert pool.grade([("4+7+11", SUM_22), ("1", SUM_22)]) == [RIGHT, WRONG]
    assert (pool.timeouts, pool.restarts) == (0, 2)


def test_a_failed_batch_leaves_nothing_behind(pool: VerifierPool) -> None:
    unpicklable = {"task": "countdown", "entry": lambda: None}
    with pytest.raises(Exception, match="pickle"):
        pool.grade([("1+1", SUM_22), ("4+7+11", unpicklable)])
    assert pool.worker_pids == []
    assert pool.grade([("4+7+11", SUM_22), ("1", SUM_22)]) == [RIGHT, WRONG]


def test_workers_are_light(pool: VerifierPool) -> None:
    pool.grade([("4+7+11", SUM_22)])
    for pid in pool.worker_pids:
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()


def test_the_trainer_side_imports_no_verifier() -> None:
    code = "import sys, megatron_reheat.rewards.pool; print(*({'torch', 'sympy', 'reasoning_gym'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_workers_do_not_inherit_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "secret")
    assert "secret" not in _worker_environment().values()


def test_a_worker_killed_from_outside_and_a_raising_math_grader() -> None:
    config = RewardConfig(kind="math", workers=1, timeout_s=60.0, answer_chars=20, incorrect=-1.0)
    reference = {"answer": "42"}
    with VerifierPool(config) as pool:
        cut_off = r"\boxed{42} and a tail"
        assert pool.grade([(r"so \boxed{42}", reference), (cut_off, reference), ("", reference)]) == [
            RIGHT,
            WRONG,
            WRONG,
        ]
        assert pool.grade([(r"\boxed{42}", {}), (r"\boxed{42}", reference)]) == [WRONG, RIGHT]
        assert pool.errors == 1

        worker = pool._workers[0]

        def kill_when_busy() -> None:
            while not worker.assigned:
                time.sleep(0.01)
            os.kill(worker.pid, signal.SIGKILL)

        killer = threading.Thread(target=kill_when_busy, daemon=True)
        killer.start()
        rewards = pool.grade([(r"\boxed{9^{9^{9^9}}}", reference), (r"\boxed{42}", reference)])
        killer.join()
        assert rewards == [LOST, RIGHT]
        assert (pool.timeouts, pool.restarts) == (0, 1)
        last = pool.worker_pids
    assert len(last) == 1
    assert not is_running(last[0])


def test_workers_that_cannot_start_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ReheatError, match=r"3 reward workers in a row did not start \(exit status 1\)"):
        VerifierPool(RewardConfig(kind="math", workers=1)).grade([("1", {"answer": "1"})])


ORPHANING_PARENT = """
import os
from megatron_reheat.config import RewardConfig
from megatron_reheat.rewards.pool import _Worker
config = RewardConfig(kind="reasoning_gym", timeout_s=0.1)
verifier = {"task": "countdown", "entry": {"metadata": {"numbers": [1], "target": 1}}}
idle, stuck = _Worker(config), _Worker(config)
assert idle.receive() == stuck.receive() == b"ready"
stuck.send([0], [("9**9**9**9", verifier)])
print(idle.pid, stuck.pid, flush=True)
os._exit(9)
"""


def test_workers_end_with_their_parent_idle_or_stuck() -> None:
    parent = subprocess.run([sys.executable, "-c", ORPHANING_PARENT], stdout=subprocess.PIPE, text=True, check=False)
    assert parent.returncode == 9
    idle, stuck = map(int, parent.stdout.split())
    assert ends(idle)
    assert ends(stuck)
