r"""Hostile answers by kind. Each is wrong, and most are right in the eyes of a grader that evaluates or is careless.

A kind is a list of (reward kind, verifier, answer), as long as it is asked for.
"""

# ruff: noqa: RUF001 - look-alikes are one of the kinds

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

Case = tuple[str, Mapping[str, Any], str]


def task(name: str, answer: Any = None, **metadata: Any) -> dict[str, Any]:
    return {"task": name, "entry": {"question": "", "answer": answer, "metadata": metadata}}


COUNTDOWN = task("countdown", "11*4 - 7", numbers=[11, 4, 7], target=37)
PUZZLE24 = task("puzzle24", "4*6*1*1", numbers=[4, 6, 1, 1])
INTEGRAL = task("simple_integration", "x**2 + C", integrand="2*x", variable="x")
PARTS = task("intermediate_integration", "x*exp(x) - exp(x) + C", integrand="x*exp(x)", variable="x")
PRODUCT = task("polynomial_multiplication", "x**2 - 1", variables=["x"])
QUEENS = task("n_queens", "_ Q\nQ _", valid_answers=["_ Q\nQ _"])
MATRIX = task("binary_matrix", "0 1\n1 0")
SPIRAL = task("spiral_matrix", "1 2 4 3")
INSERTION = task("string_insertion", "ABCD")
# every task whose scorer in reasoning-gym evaluates the answer
EVALUATING = [COUNTDOWN, PUZZLE24, INTEGRAL, PARTS, PRODUCT, QUEENS, MATRIX, SPIRAL, INSERTION]
CHAIN_SUM = task("chain_sum", "22")
HALTING = task("game_of_life_halting", "True")
MATH = {"answer": "42"}


def on(verifiers: Iterable[Mapping[str, Any]], *answers: str) -> Callable[[], Iterator[Case]]:
    """Every answer to every one of the verifiers; after that the same again, behind some words, so that it is graded anew."""

    def cases() -> Iterator[Case]:
        for round_ in itertools.count():
            for answer, verifier in itertools.product(answers, list(verifiers)):
                if "task" not in verifier:
                    yield "math", verifier, f"{answer[:-1]}{' ' * round_}}}"
                else:
                    said = f"Attempt {round_}: <answer>{answer}</answer>"
                    yield "reasoning_gym", verifier, said if round_ else answer

    return cases


def code(*programs: str) -> Callable[[], Iterator[Case]]:
    """Expressions with side effects: to every evaluating task, alone and beside a value that is right."""
    beside = [f"({program}) or 37" for program in programs]
    return on(EVALUATING, *programs, *beside, *(f"[{program}, 11*4-7][1]" for program in programs))


_OS = "__import__('os')"
_MANY = "<answer>" * 20_000

KINDS: dict[str, Callable[[], Iterator[Case]]] = {
    "signals": code(
        f"{_OS}.kill({_OS}.getppid(), 9)", f"{_OS}.kill(1, 9)", f"{_OS}.killpg(0, 15)", f"{_OS}.kill(-1, 9)"
    ),
    "bytes to file descriptors": code(
        f"[{_OS}.write(fd, b'1') for fd in range(3, 20)]", f"{_OS}.write(3, b'1')", f"{_OS}.closerange(0, 99)"
    ),
    "shells and programs": code(f"{_OS}.system('sleep 99 &')", "__import__('subprocess').run(['sleep', '99'])"),
    "forks": code(f"{_OS}.fork()", f"[{_OS}.fork() for _ in iter(int, 1)]"),
    "ends of the process": code(f"{_OS}._exit(0)", "exit()", "__import__('sys').exit(1)", f"{_OS}.abort()"),
    "endless loops": code("[0 for _ in iter(int, 1)]", "all(iter(lambda: 1, 0))", "__import__('time').sleep(9999)"),
    "power towers": on([COUNTDOWN, PUZZLE24, PRODUCT, INTEGRAL], "9**9**9**9", "11*4-7*1**9**9**9", "2**(2**(2**99))"),
    "large numbers": on(
        [COUNTDOWN, PUZZLE24, PRODUCT, INTEGRAL],
        "1<<10**10",
        "factorial(10**6)",
        "9" * 1500,
        "10**99999999",
        "99999999!",
    ),
    "memory": code("[0]*10**11", "'a'*10**12", "bytearray(10**12)", "list(range(10**11))"),
    "nesting": on(
        EVALUATING, "(" * 900 + "37" + ")" * 900, "[" * 900, "-" * 1500 + "37", "+(" * 700 + "37" + ")" * 700
    ),
    "strings in arithmetic": on(
        [COUNTDOWN, PUZZLE24], "37 or '11 4 7'", "24 or '4 6 1 1'", "len('11 4 7')*0+37", "'11' and 37"
    ),
    "comments": on([COUNTDOWN, PUZZLE24], "37 # 11 4 7", "24 # 4 6 1 1", "11*4 - 7 # 37", "4*6 # 1 1", "30+7 # 11 4"),
    "and, or, not": on(
        [COUNTDOWN, PUZZLE24], "37 or 11*4*7", "11*4-7 or 7", "24 or 4*6*1*1", "(37 and 37) or 11 or 4 or 7"
    ),
    "comparisons and conditions": on(
        [COUNTDOWN, PUZZLE24],
        "37 if 11 < 4 else 37 if 7 else 0",
        "24 if 4 != 6 else 1",
        "(11 > 4) * 37 + 7 * 0",
        "11*4-7 == 37",
    ),
    "assignments": on([COUNTDOWN, PUZZLE24], "(x := 37)", "x = 37", "(n := 11*4) - 7", "11*4-7 = 37", "24 = 4*6*1*1"),
    "lambdas": code("(lambda: 37)()", "(lambda f: f(f))(lambda f: f(f))"),
    "comprehensions": code("[37 for _ in (11, 4, 7)][0]", "sum(x for x in (30, 7))", "max({11: 37, 4: 7}.values())"),
    "attributes": code(
        "().__class__.__base__.__subclasses__()", "(37).__init__.__globals__", "x.func.__globals__", "(37).real"
    ),
    "format strings": code("'{0.__class__.__mro__}'.format(37)", "f'{37}'", "'%s' % 37", "str.format('{}', 37)"),
    "imports": code(
        "__import__('math').inf", "__builtins__", "__loader__.load_module('os')", "globals()", "exec('value=37')"
    ),
    "frames": code(
        "__import__('sys')._getframe(3).f_locals['entry']['answer']",
        "[f.f_locals for f in __import__('inspect').stack()]",
        "__import__('gc').get_objects()",
    ),
    "patches": code(
        "setattr(__import__('builtins'), 'float', lambda x: 1.0)",
        "__import__('sys').modules.clear()",
        "setattr(__import__('reasoning_gym.games.countdown').games.countdown.CountdownDataset, 'score_answer', lambda *a: 1.0)",
    ),
    "C calls": code("__import__('ctypes').string_at(0)", "__import__('ctypes').CDLL(None).fork()"),
    "threads and exits": code(
        "__import__('threading').Thread(target=print).start()",
        "__import__('atexit').register(print)",
        "__import__('_thread').start_new_thread(print, ())",
    ),
    "signal handlers": code("__import__('signal').signal(15, 1)", "__import__('signal').setitimer(0, 1)"),
    "files": code(
        "open('/tmp/left_by_an_answer', 'w')",
        "open('/proc/self/environ').read()",
        "__import__('shutil').rmtree('/nowhere')",
    ),
    "sockets": code(
        "__import__('socket').create_connection(('127.0.0.1', 9))",
        "__import__('urllib.request').request.urlopen('http://127.0.0.1')",
    ),
    "other scripts": on(
        [COUNTDOWN, PUZZLE24, CHAIN_SUM],
        "１１*４-７",
        "11×4−7",
        "𝟙𝟙*4-7",
        "11*4\u200b-7",
        "٤*٦*١*١",
        "²²",
        "٢٢",
        "２２",
        "4⋅6⋅1⋅1",
    ),
    "other numerals": on(
        [COUNTDOWN, PUZZLE24, CHAIN_SUM],
        "1_1*4-7",
        "0xb*4-7",
        "0b1011*4-7",
        "011*04-07",
        "11.*4-7",
        "1.1e1*4-7",
        "4*6*1_1",
        "2_2",
        "0x16",
        "11*4-7.0",
    ),
    "other numbers": on(
        [COUNTDOWN, PUZZLE24],
        "37",
        "24",
        "11*4-7+1-1",
        "11*4-7*1",
        "30+7",
        "4*6",
        "4*6*1",
        "8*3*1*1",
        "12*2*1*1",
        "(11*4-7)*1",
        "11*4-11+4",
        "4.6*1*1+19.4",
    ),
    "no numbers": on(
        [COUNTDOWN, PUZZLE24, CHAIN_SUM, PRODUCT],
        "11/(4-4)*7",
        "nan",
        "inf",
        "oo",
        "zoo",
        "11*4-7+0/0",
        "True*37",
        "1e999",
        "-inf",
    ),
    "work left to the grader": on(
        [INTEGRAL, PARTS, PRODUCT],
        "integrate(2*x, x)",
        "Integral(2*x, x)",
        "Integral(x*exp(x), x) + C",
        "integrate(x*exp(x))",
        "expand((x-1)*(x+1))",
        "solve(x)",
        "simplify(x**2-1)",
        "sympify('x**2-1')",
        "S('x**2 + C')",
        "(x-1)*(x+1).expand()",
        "Poly(x**2-1)",
        "diff(x**3/3-x, x)",
    ),
    "dear expressions": on(
        [INTEGRAL, PARTS],
        "sin(" * 50 + "x" + ")" * 50,
        "(x+1)**199*(x+2)**199*exp(x)",
        "exp(exp(exp(exp(exp(x)))))**x**x**x",
        "*".join(["(sin(x)+cos(x)+1)**50"] * 9),
    ),
    "numerals without end": on(
        [
            task("coin_flip", "0.5"),
            task("power_function", "2.0"),
            task("decimal_arithmetic", "2.5"),
            task("number_format", "2", solution=2.0),
            task("decimal_chain_sum", "2"),
            task("rectangle_count", "2"),
        ],
        "1e999999999",
        "nan",
        "1/1e-999999999",
        "9" * 4000,
        "sNaN",
        "1_0",
        "Infinity",
        "1E+999999999999",
    ),
    "NaN where it is equal": on(
        [
            task("complex_arithmetic", "1.0 + 2.0i", result=[1.0, 2.0]),
            task("number_sorting", "['1', '2', '3']", direction="ascending"),
            task("polynomial_equations", "1.0"),
            task("advanced_geometry", "3.0°", task_type="angle_measure"),
        ],
        "nan",
        "nan+nanj",
        "[NaN, NaN, NaN]",
        "['nan', 'nan', 'nan']",
        "nan, nan",
        "[Infinity, Infinity, Infinity]",
        "inf-infj",
    ),
    "right by carelessness": on(
        [HALTING, task("polynomial_equations", "")],
        "no idea",
        "maybe",
        "bool",
        "nonsense, more of it",
        "__import__('os')",
        "None, really",
    ),
    "JSON": on(
        [
            task("game_of_life", "[[0,1],[1,0]]"),
            task("graph_color", None, puzzle={"vertices": [0, 1], "edges": [[0, 1]], "color_options": [1, 2]}),
            task("jugs", None, puzzle={"jug_capacities": [3, 5], "target": 4}),
            task("group_anagrams", "[]", solution=[["ab", "ba"]]),
            task("palindrome_partitioning", "[]", solution=[["a", "a"]]),
            task("boxnet", "[]", initial_state={"0.5_0.5": ["box_red"]}),
            task("knight_swap", "[]", is_possible=True, board={}, pieces={}, start_turn="w", solution=["w,A1,A2"]),
        ],
        "[" * 50_000,
        "[NaN]",
        "[[true,1],[1,0],[0,0]]",
        "[[0,1,1],[1,0,1]]",
        '{"0": 1}',
        "9" * 5000,
        "[1, 2]",
        '["fill A"]',
        "{}",
        "null",
    ),
    "moves without end": on(
        [
            task("rubiks_cube", None, cube_size=3, scramble_moves="R U"),
            task("rush_hour", None, board_config="oooooooooooooAAooooooooooooooooooooo"),
        ],
        "R999999999",
        "A+999999999",
        "R" + "9" * 4000,
        "A+" + "9" * 4000,
        "R999999999 U999999999",
    ),
    "logic": on(
        [task("propositional_logic", None, premises=["P", "(P → Q)"], variables=["P", "Q"])],
        " ∨ ".join(f"p{i}" for i in range(40)),
        "¬" * 1999 + "P",
        "(" * 3000,
        "__import__('os')",
        "P ∧ ¬P",
        "(P ∨ ¬P)",
    ),
    "tags": on(
        [COUNTDOWN, CHAIN_SUM],
        _MANY,
        _MANY + "37",
        "</answer>" * 20_000,
        "<answer>" + "37" * 60_000 + "</answer>",
        "11*4-7</answer><answer>1</answer>",
    ),
    "LaTeX": on(
        [MATH],
        r"\boxed{9^{9^{9^{9}}}}",
        r"\boxed{\sum_{n=1}^{10^{9}} n^{n}}",
        r"\boxed{10^{10^{10}}!}",
        r"\boxed{\int_0^1 e^{e^{e^{e^{x}}}} dx}",
        r"\boxed{" + "{" * 400 + "42" + "}" * 399,
        r"\boxed{" + r"\frac{1}{" * 60 + "1" + "}" * 60 + "}",
        r"\boxed{\input{/etc/passwd}}",
        r"\boxed{\lim_{x \to 0} x^{x^{x}}}",
        r"\boxed{" + r"\sqrt{" * 60 + "2" + "}" * 60 + "}",
        r"\boxed{\binom{10^{9}}{10^{8}}}",
    ),
    "Python in a box": on(
        [MATH],
        r"\boxed{__import__('os')._exit(0)}",
        r"\boxed{42 or 43}",
        r"\boxed{(lambda: 42)()}",
        r"\boxed{41 # 42}",
        r"\boxed{sympify('42')}",
        r"\boxed{\text{42}.__class__}",
        r"\boxed{exec('42')}",
        r"\boxed{open('/tmp/left_by_an_answer', 'w')}",
    ),
}


def cases(kind: str, count: int) -> list[Case]:
    return list(itertools.islice(KINDS[kind](), count))
