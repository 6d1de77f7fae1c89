"""Model text that attacks the graders. The whole is `python -m scripts.faults.hostile_answers`; this is a tenth of it."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import psutil
import pytest
import reasoning_gym

from megatron_reheat.config import RewardConfig
from megatron_reheat.rewards.expressions import NotInGrammar, algebra, arithmetic
from megatron_reheat.rewards.pool import Item, VerifierPool
from megatron_reheat.rewards.reasoning_gym import verify_reasoning_gym
from scripts.faults import hostile_kinds
from scripts.faults.attacks import ATTACKS
from scripts.faults.hostile_answers import EXECUTING, HONEST, UNGUARDED, Outcome, attack, honest_text
from scripts.faults.hostile_kinds import KINDS, cases

TIMEOUT_S = 1.0
HONEST_TIMEOUT_S = 3.0  # an honest answer to a fresh grader has to make it on a busy machine
# Programs of every kind but those that only take time, which test_rewards has.
TENTH = [
    *("kill the parent", "kill everything", "stop itself", "kill numbers around"),
    *("a byte to every file descriptor", "many records", "a flood, then an exit", "close every file descriptor"),
    *("fork bomb", "a subprocess without audit", "a thread that stays", "SystemExit", "at exit", "an abort"),
    *("a list without end", "a socket without audit", "an exception that fails to print", "a tracer"),
]


# -- the graders as they are -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("reward_kind", ["reasoning_gym", "math"])
def test_hostile_answers_of_every_kind(reward_kind: str, caplog: pytest.LogCaptureFixture) -> None:
    every = {name: [case for case in cases(name, 3) if case[0] == reward_kind] for name in KINDS}
    hostile: list[Item] = [(text, verifier) for drawn in every.values() for _, verifier, text in drawn]
    hostile += [(f"exec({program!r}) or 37", hostile_kinds.COUNTDOWN) for program in ATTACKS.values()]
    if reward_kind == "math":
        hostile = [(text, verifier) for text, verifier in hostile if "task" not in verifier]
    assert len(hostile) >= (6 if reward_kind == "math" else 150)
    with (
        caplog.at_level(logging.INFO, logger="megatron_reheat.rewards.pool"),
        VerifierPool(RewardConfig(kind=reward_kind, workers=2, timeout_s=HONEST_TIMEOUT_S)) as pool,  # type: ignore[arg-type]
    ):
        outcome = attack(pool, hostile, HONEST[reward_kind], HONEST_TIMEOUT_S)
        assert (outcome.passed, outcome.late, outcome.honest_wrong) == (0, 0, 0)
        processes = workers_processes(pool)
        assert 4 <= len(processes) <= 6  # a grader that was lost is replaced when there is work
    assert not any(process.is_running() for process in processes)
    started = [record.getMessage() for record in caplog.records if "run behind" in record.getMessage()]
    assert len(started) == 1
    for line in ("grammars", "limits", "namespaces", "system call filter", "audit hook"):
        assert line in started[0]


def workers_processes(pool: VerifierPool) -> list[psutil.Process]:
    workers = [psutil.Process(pid) for pid in pool.worker_pids]
    return [*workers, *(process for worker in workers for process in worker.children(recursive=True))]


# -- answers that are run all the same ---------------------------------------------------------------------------------


@pytest.fixture(params=["executing_worker", "bare_worker"])
def executing(request: pytest.FixtureRequest) -> Iterator[VerifierPool]:
    config = RewardConfig(kind="reasoning_gym", workers=1, timeout_s=TIMEOUT_S)
    with VerifierPool(config, f"scripts.faults.{request.param}") as pool:
        pool.grade([EXECUTING[0]])
        yield pool


@pytest.mark.slow
def test_an_answer_that_runs_code_reaches_nothing_outside(
    executing: VerifierPool, request: pytest.FixtureRequest
) -> None:
    # without the filter of system calls, a thread stays until the grader is replaced
    bare = "bare_worker" in request.node.name
    held_by_the_filter = {"a thread that stays", "a socket without audit", "kill numbers around"} if bare else set()
    for name in TENTH:
        if name in held_by_the_filter:
            continue
        outcome = attack(executing, [(ATTACKS[name], {"answer": 1})], EXECUTING, TIMEOUT_S)
        after = [(honest_text(text, number), verifier) for number in range(5) for text, verifier in EXECUTING]
        verdicts = [reward.correct for reward in executing.grade(after)]
        assert (name, outcome.passed, outcome.late, outcome.honest_wrong) == (name, 0, 0, 0)
        assert (name, verdicts) == (name, [True, False] * 5)
    processes = workers_processes(executing)
    assert len(processes) <= 4  # and in the bare worker one that an answer has started
    executing.close()
    assert not any(process.is_running() for process in processes)


def test_where_a_grammar_has_a_hole_nothing_is_evaluated() -> None:
    tasks = [*hostile_kinds.EVALUATING]
    hostile: list[Item] = [("[11*4-7, print(1)][0]", verifier) for verifier in tasks]
    hostile += [("exec('while True: pass') or 37", verifier) for verifier in tasks]
    hostile += [
        ("11*4-7", hostile_kinds.COUNTDOWN),
        ("x**2 + C", hostile_kinds.INTEGRAL),
    ]  # right, but only for who evaluates
    config = RewardConfig(kind="reasoning_gym", workers=1, timeout_s=TIMEOUT_S)
    with VerifierPool(config, "scripts.faults.unguarded_worker") as pool:
        outcome = attack(pool, hostile, UNGUARDED, TIMEOUT_S)
    outcome.left = 0
    assert outcome == Outcome(count=len(hostile))


def test_a_missing_line_of_defence_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with VerifierPool(RewardConfig(kind="reasoning_gym", workers=1), "scripts.faults.bare_worker") as pool:
        assert pool.grade([EXECUTING[0]])[0].correct
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "missing: namespaces" in caplog.text
    assert "system call filter" in caplog.text


# -- the guards --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("11*4 - 7", 37, [11, 4, 7]),
        (" ( 1 + 2 ) * 3/4 ", Fraction(9, 4), [1, 2, 3, 4]),
        ("2 - 3 - 4", -5, [2, 3, 4]),
        ("8 / 4 / 2", 1, [8, 4, 2]),
        ("-2 - -3*+1", 1, [2, 3, 1]),
        ("1/3*3", 1, [1, 3, 3]),
        ("0*5", 0, [0, 5]),
    ],
)
def test_arithmetic(text: str, value: int | Fraction, numbers: list[int]) -> None:
    assert arithmetic(text).value == value
    assert list(arithmetic(text).numbers) == numbers


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "()", "1 2", "2(3)", "(2)(3)", "1 +", "* 2", "(1", "1)", "1,2", "1/0", "2/(3-3)"),
        *(
            "2**3",
            "7//2",
            "7%2",
            "2^3",
            "5!",
            "1 if 2 else 3",
            "1 or 2",
            "not 1",
            "1 # 2",
            "1 == 1",
            "(x := 1)",
            "x",
            "pi",
        ),
        *(
            "1.0",
            "1.",
            ".5",
            "1e3",
            "1j",
            "0x1f",
            "0b1",
            "1_0",
            "007",
            "00",
            "nan",
            "inf",
            "True",
            "'1'",
            "[1][0]",
            "int(1)",
        ),
        *("\uff11+1", "\u0661", "1\u22121", "2\u00d73", "1\u200b+1", "\u00b2", "1\x00", "1;2", "1\\\n+1"),
        *("(" * 100 + "1" + ")" * 100, "-" * 100 + "1", "1+" * 2000 + "1", "9" * 100),
    ],
)
def test_what_is_no_arithmetic(text: str) -> None:
    with pytest.raises(NotInGrammar):
        arithmetic(text)


@pytest.mark.parametrize(
    "text", ["x**2/2 + C", "-cos(2*x)*exp(-x)", "log(x + 1)**2", "2**x", "x**-1", "0.5*x", "E**x + pi"]
)
def test_algebra_is_read_as_sympy_prints_it(text: str) -> None:
    assert str(algebra(str(algebra(text)))) == str(algebra(text))


@pytest.mark.parametrize(
    "text",
    [
        *(
            "x.args",
            "integrate(x, x)",
            "Integral(x, x)",
            "S('x')",
            "f(x)",
            "sin x",
            "2x",
            "x^2",
            "lambda: x",
            "x[0]",
            "1/0",
            "zoo",
        ),
        *(
            "9**9**9**9",
            "x**1000000",
            "2**(2**(2**20))",
            "(2**200)**200",
            "((3**190)**190)",
            "x**(2**200)",
            "__name__",
            "_x",
        ),
    ],
)
def test_what_is_no_algebra(text: str) -> None:
    if text == "zoo":
        assert algebra(text).is_Symbol
    else:
        with pytest.raises(NotInGrammar):
            algebra(text)


# Where reasoning-gym 0.1.25 evaluates text or calls what does. With each the scorers come upon an answer or a reference:
# `guards` deals with these (the last has a parser of its own, of the same name as sympy's).
EVALUATES = {
    *("algebra/simple_integration.py", "algebra/intermediate_integration.py", "algebra/polynomial_multiplication.py"),
    *("algorithmic/binary_matrix.py", "algorithmic/number_sorting.py", "algorithmic/spiral_matrix.py"),
    *("algorithmic/string_insertion.py", "arithmetic/bitwise_arithmetic.py", "games/countdown.py", "games/n_queens.py"),
    *("games/puzzle24.py", "logic/propositional_logic.py"),
}
# Here only the generators of questions do, which nothing of a model reaches.
OF_QUESTIONS = {
    *("arithmetic/basic_arithmetic.py", "code/codeio.py"),
    *("arithmetic/gsm_symbolic/generators_00_49.py", "arithmetic/gsm_symbolic/generators_50_99.py"),
}
EVALUATION = re.compile(r"(?<![\w.])(?:eval|exec)\(|\b(?:parse_expr|parse_latex|sympify|lambdify|literal_eval)\(")


def test_reasoning_gym_evaluates_where_it_is_known_to() -> None:
    root = Path(reasoning_gym.__path__[0])
    found = {str(path.relative_to(root)) for path in root.rglob("*.py") if EVALUATION.search(path.read_text())}
    assert found == EVALUATES | OF_QUESTIONS


def test_many_open_tags_take_no_time() -> None:
    began = time.monotonic()
    assert verify_reasoning_gym("<answer>" * 50_000, hostile_kinds.COUNTDOWN) == 0.0
    assert (
        verify_reasoning_gym("<answer>1</answer>" * 5_000 + "<answer>11*4-7</answer>", hostile_kinds.COUNTDOWN) == 1.0
    )
    assert time.monotonic() - began < 2.0
