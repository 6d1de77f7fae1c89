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

import psutil
import pytest

from megatron_reheat.config import RewardConfig
from megatron_reheat.errors import ReheatError
from megatron_reheat.rewards.math import last_boxed, verify_math
from megatron_reheat.rewards.pool import VerifierPool
from megatron_reheat.rewards.reasoning_gym import verify_reasoning_gym
from megatron_reheat.rewards.worker_process import worker_environment
from megatron_reheat.types import Reward

RIGHT = Reward(1.0, correct=True)
WRONG = Reward(-1.0, correct=False)
LOST = Reward(-1.0, correct=False, timed_out=True)

# for the pool whose workers run their answers, as no other does
HANGS = "while True: pass"
DIES = "import os; os._exit(3)"
ONE = {"answer": 1}


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


@pytest.fixture(scope="module")
def executing() -> Iterator[VerifierPool]:
    """A pool whose workers run the answers as programs: what hangs, dies and misbehaves does so under the grader."""
    config = RewardConfig(kind="reasoning_gym", workers=2, timeout_s=3.0, incorrect=-1.0)
    with VerifierPool(config, "scripts.faults.executing_worker") as pool:
        pool.grade([(f"value = 1 # {n}", ONE) for n in range(40)])
        yield pool


@pytest.fixture(autouse=True)
def no_counts_left_over(request: pytest.FixtureRequest) -> None:
    for name in {"pool", "executing"} & set(request.fixturenames):
        shared = request.getfixturevalue(name)
        shared.timeouts = shared.restarts = shared.errors = 0


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        (r"Hence \boxed{42}.", "42", True),
        (r"Hence \boxed{41}.", "42", False),
        (r"\boxed{1}, no: \boxed{42}", "42", True),
        (r"\boxed{42}, no: \boxed{1}", "42", False),
        (r"\boxed{42}, no: \boxed{\frac{}", "42", True),
        (r"\boxed{42}, no: \boxed{41}, and \boxed{\frac{", "41", True),
        (r"\boxed{42}, no: \boxed{41}, and \boxed{\frac{", "42", False),
        (r"\boxed{42} is in the \boxed environment, as you asked", "42", True),
        (r"\boxed{42}" + " and so on" * 1000, "42", True),
        (r"\boxed{x = \boxed{42}}", "42", True),
        (r"\boxed{\boxed{42}}", "42", True),
        (r"\boxed{42}, as \boxed{} was asked for", "42", True),
        (r"\boxed{42} { and } \boxed{", "42", True),
        (r"\boxed{42}" + r" {on} \{" * 1000 + r"\boxed{", "42", True),
        (r"\boxed{41}" + r" {on} \{" * 1000 + r"\boxed{42}", "42", True),
        (r"\fbox{42}", "42", True),
        (r"so $\boxed 42$", "42", True),
        (r"so $\boxed 4$", "42", False),
        (r"so $\boxed\frac12$", "0.5", True),
        (r"\\boxed{42}", "42", True),
        (r"\boxed{\left\{ 42 \right\}}", "42", True),
        (r"\boxed{\text{The answer is } 42}", "42", True),
        ("So it is.\nAnswer: 42", "42", True),
        ("So it is.\n**Answer:** $42$\n", "42", True),
        ("Answer: 41\nOh.\nFinal answer: 42.", "42", True),
        ("Answer: 42\nOh.\nAnswer: 41", "42", False),
        (r"Answer: 42, that is \boxed{41}", "42", False),
        ("A wrong answer: 42 comes first", "42", False),
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


def test_a_hanging_grader_is_killed_once_and_others_survive(executing: VerifierPool) -> None:
    before = set(executing.worker_pids)
    others = [(f"value = {n} + 2", ONE) for n in range(40)]
    rewards = executing.grade([(HANGS, ONE), *others, (HANGS, ONE), ("value = 1", ONE)])
    assert rewards == [LOST, *[WRONG] * 40, LOST, RIGHT]
    assert (executing.timeouts, executing.restarts) == (1, 1)
    assert set(executing.worker_pids) == before  # only the process under the answer was replaced


def test_a_grader_that_ends_its_process_costs_only_its_item(executing: VerifierPool) -> None:
    assert executing.grade([("value = 1", ONE), (DIES, ONE), ("value=1", ONE)]) == [RIGHT, LOST, RIGHT]
    assert (executing.timeouts, executing.restarts) == (0, 1)


def test_memory_is_limited_and_side_effects_are_refused(executing: VerifierPool, tmp_path: Path) -> None:
    target = tmp_path / "written"
    hostile = [
        "[0]*10**11",
        f"open('{target}', 'w')",
        f"import os; os.system('touch {target}')",
        f"import os; os.kill({os.getpid()}, 0); value = 1",
    ]
    assert executing.grade([(text, ONE) for text in hostile]) == [WRONG] * len(hostile)
    assert not target.exists()
    assert (executing.timeouts, executing.restarts, executing.errors) == (0, 0, 4)


def test_a_worker_that_died_between_batches_costs_nothing(pool: VerifierPool) -> None:
    pool.grade([("4+7+11", SUM_22), ("1", SUM_22)])
    for pid in pool.worker_pids:
        os.kill(pid, signal.SIGKILL)
        assert ends(pid)
    assert pool.grade([("4+7+11", SUM_22), ("1", SUM_22)]) == [RIGHT, WRONG]
    assert (pool.timeouts, pool.restarts) == (0, 2)


def test_a_failed_batch_leaves_nothing_behind(executing: VerifierPool, monkeypatch: pytest.MonkeyPatch) -> None:
    before = executing.worker_pids
    with pytest.raises(Exception, match="pickle"):
        executing.grade([("value = 1", ONE), ("value = 1", {"answer": lambda: None})])
    assert executing.worker_pids == before  # nothing had been sent

    def interrupted(correct: bool, timed_out: bool = False) -> Reward:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(executing, "_reward", interrupted)
        executing.grade([(f"value = {n}", ONE) for n in range(40)])
    assert executing.worker_pids == []
    assert executing.grade([("value = 1", ONE), ("value = 2", ONE)]) == [RIGHT, WRONG]


def test_workers_are_light(pool: VerifierPool) -> None:
    pool.grade([("4+7+11", SUM_22)])
    processes = [process for pid in pool.worker_pids for process in psutil.Process(pid).children(recursive=True)]
    assert processes
    for process in processes:
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()


def test_the_trainer_side_imports_no_verifier() -> None:
    code = "import sys, megatron_reheat.rewards.pool; print(*({'torch', 'sympy', 'reasoning_gym'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_workers_do_not_inherit_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "secret")
    assert "secret" not in worker_environment(confined=True).values()


def test_of_a_math_response_the_box_counts_and_a_grader_that_raises_is_counted() -> None:
    config = RewardConfig(kind="math", workers=1, timeout_s=60.0, answer_chars=20, incorrect=-1.0)
    reference = {"answer": "42"}
    with VerifierPool(config) as pool:
        responses = {
            r"so \boxed{42}": RIGHT,
            r"\boxed{42} and a tail of more than twenty characters": RIGHT,
            "So we are done.\nAnswer: 42": RIGHT,
            "Answer: 42\nand a tail of more than twenty characters": WRONG,
            "": WRONG,
        }
        assert pool.grade([(response, reference) for response in responses]) == list(responses.values())
        assert pool.grade([(r"\boxed{42}", {}), (r"\boxed{42}", reference)]) == [WRONG, RIGHT]
        assert pool.errors == 1
        last = psutil.Process(pool.worker_pids[0])
        last = [last, *last.children(recursive=True)]
    assert len(last) == 3
    assert not any(is_running(process.pid) for process in last)


def test_a_worker_killed_from_outside_costs_the_item_under_it(executing: VerifierPool) -> None:
    def kill_when_busy() -> None:
        while not (
            busy := [worker for worker in executing._workers if any(task.text == HANGS for task in worker.assigned)]
        ):
            time.sleep(0.01)
        os.kill(busy[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_when_busy, daemon=True)
    killer.start()
    assert executing.grade([(HANGS, ONE), ("value = 1", ONE)]) == [LOST, RIGHT]
    killer.join()
    assert (executing.timeouts, executing.restarts) == (0, 1)


def test_workers_that_are_started_early() -> None:
    with VerifierPool(RewardConfig(kind="reasoning_gym", workers=2)) as pool:
        assert not pool.worker_pids
        pool.start()
        give_up = time.monotonic() + 60
        while len(early := pool.worker_pids) < 2 and time.monotonic() < give_up:
            time.sleep(0.01)
        assert pool.grade([("7+4+11", SUM_22)]) == [Reward(1.0, correct=True)]
        assert pool.worker_pids == early
        pool.close()
        assert not pool.worker_pids
        assert all(map(ends, early))
        pool.close()
        assert pool._thread is None and not pool.worker_pids  # what was once wanted early is not started again


def test_workers_that_cannot_start_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ReheatError, match=r"3 reward workers in a row did not start \(exit status 1\)"):
        VerifierPool(RewardConfig(kind="math", workers=1)).grade([("1", {"answer": "1"})])


ORPHANING_PARENT = """
import os, pickle, psutil
from megatron_reheat.config import RewardConfig
from megatron_reheat.rewards.worker_process import Task, Worker
config = RewardConfig(kind="reasoning_gym", timeout_s=100.0)
idle, stuck = (Worker(config, "scripts.faults.executing_worker") for _ in range(2))
assert idle.receive().startswith(b"ready") and stuck.receive().startswith(b"ready")
stuck.send([Task("while True: pass", pickle.dumps({"answer": 1}), None)], 0)
print(*(process.pid for process in psutil.Process().children(recursive=True)), flush=True)
os._exit(9)
"""


def test_workers_end_with_their_parent_idle_or_stuck() -> None:
    parent = subprocess.run([sys.executable, "-c", ORPHANING_PARENT], stdout=subprocess.PIPE, text=True, check=False)
    assert parent.returncode == 9
    processes = [int(pid) for pid in parent.stdout.split()]
    assert len(processes) == 6  # of each worker: its keeper, its supervisor and its grader
    assert all(ends(pid) for pid in processes)
