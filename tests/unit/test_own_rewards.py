"""Reward functions of the user's own: how they are named, what they return, what they may do, and what their failures say."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.own_reward import judge
from examples.own_reward.rewards import brevity, closeness
from megatron_reheat.config import RewardConfig
from megatron_reheat.config_fields import LOGGED_REWARDS, MAX_FUNCTIONS, MAX_REWARD
from megatron_reheat.errors import ConfigError, ReheatError
from megatron_reheat.recipe import load_config
from megatron_reheat.rewards.functions import MAX_VALUE, check_functions
from megatron_reheat.rewards.pool import VerifierPool
from megatron_reheat.rewards.protocol import MAX_VALUES, REPLY
from megatron_reheat.rewards.self_check import try_functions
from megatron_reheat.stages.collect import rollout_metrics
from megatron_reheat.types import Completion, Group, Prompt, Reward

FUNCTIONS = """
import os, socket, subprocess, time
from beside import LIMIT

def length(response, record):
    return len(response) / LIMIT

def same(response, record):
    return response == record["wanted"]

def judged(response, record):
    return 0.25, response == "right"

def shared(response, record):
    record["wanted"] += "!"
    return record["wanted"] == "x!"

def odd(response, record):
    return {"none": None, "nan": float("nan"), "large": 1e9, "text": "one", "numeral": "1.5"}[response]

def hangs(response, record):
    if response == "hang":
        time.sleep(60)
    return 1.0

def environment(response, record):
    return float(response in os.environ)

def network(response, record):
    with socket.create_connection(("127.0.0.1", int(response)), timeout=5):
        return 1.0

def child(response, record):
    return float(subprocess.run(["true"]).returncode == 0)

def writes(response, record):
    with open(response, "w") as file:
        file.write("kept")
    return 1.0

not_a_function = 3
"""

Pool = Callable[..., VerifierPool]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "beside.py").write_text("LIMIT = 10\n")
    path = folder / "mine.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.fixture
def pool(file: Path) -> Iterator[Pool]:
    opened: list[VerifierPool] = []

    def make(*names: str, **keys: Any) -> VerifierPool:
        function = {f"{file}:{name}": 1.0 for name in names}
        opened.append(VerifierPool(RewardConfig(**{"function": function, "workers": 1, **keys})))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def verifier(where: str = "record 7 of x.jsonl", **record: Any) -> dict[str, Any]:
    return {"record": record, "where": where}


# -- naming them -------------------------------------------------------------------------------------------------------


def test_naming_a_function_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{model: {hf_path: m}, data: {path: d.jsonl}, reward: {function: mine.py:score}}")
    reward = load_config(recipe).reward
    assert (reward.kind, dict(reward.function or {})) == ("function", {f"{tmp_path}/mine.py:score": 1.0})
    several = load_config(recipe, ["reward.function={mine.py:score: 2, pack.age:brief: -0.1}"]).reward.function
    assert dict(several or {}) == {f"{tmp_path}/mine.py:score": 2.0, "pack.age:brief": -0.1}


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"kind": "function"}, "reward: kind function needs `function`, e.g. rewards.py:score"),
        ({"kind": "math", "function": "a.py:f"}, "reward: `function` is given, and kind is math"),
        ({"sandbox": False}, "reward: sandbox=false is for functions of your own only"),
        ({"function": "a.py"}, "reward.function: 'a.py' is not path/to/file.py:name or package.module:name"),
        ({"function": "a.py:1f"}, "'a.py:1f' is not path/to/file.py:name"),
        ({"function": {"a.py:f": 1, "b:f": 1}}, "reward.function: two functions are called f"),
        ({"function": {f"a.py:f{i}": 1 for i in range(9)}}, "reward.function: at most 8 functions"),
        (
            {"function": "a.py:accuracy"},
            "reward.function: a function called accuracy would be logged as reward/accuracy",
        ),
        ({"function": {"a.py:f": 1e9}}, "reward.function.*f: .*less than or equal to 1000000"),
        ({"function": {"a.py:f": "much"}}, "reward.function.*f: .*number"),
        ({"function": []}, "reward.function"),
        ({"function": "a.py:f", "correct_at": 1e7}, "reward.correct_at"),
    ],
)
def test_a_wrong_name_is_one_sentence(tmp_path: Path, reward: dict[str, Any], message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"model": {"hf_path": "m"}, "data": {"path": "d.jsonl"}, "reward": reward}))
    with pytest.raises(ConfigError, match=message) as error:
        load_config(recipe)
    assert "\n" not in str(error.value)


def test_a_reply_has_room_for_all_of_them() -> None:
    assert MAX_VALUES == MAX_FUNCTIONS
    assert REPLY.size == 8 + 1 + 8 * MAX_VALUES + 183


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("{folder}/none.py:f", r"no such file: .*none\.py"),
        ("{folder}/mine.py:lenght", r"mine\.py has no function 'lenght'; did you mean 'length'\?"),
        ("{folder}/broken.py:f", r"broken\.py cannot be read: SyntaxError: .*line 1"),
        ("no.such.module:f", r"no module 'no\.such\.module' .*PYTHONPATH"),
        ("nosuchmodule:f", r"no module 'nosuchmodule'"),
    ],
)
def test_one_that_is_not_there_is_named_before_anything_runs(file: Path, function: str, message: str) -> None:
    (file.parent / "broken.py").write_text("def f(:\n")
    with pytest.raises(ConfigError, match=r"^reward\.function: .*" + message):
        check_functions([function.format(folder=file.parent)])


def test_whatever_a_file_binds_may_be_one(tmp_path: Path) -> None:
    path = tmp_path / "bound.py"
    path.write_text("from math import sqrt as root\nf = lambda r, d: 1\nif True:\n    def g(r, d): ...\nclass C: ...\n")
    check_functions([*(f"{path}:{name}" for name in ("root", "f", "g", "C")), "examples.own_reward.rewards:closeness"])


# -- what they return --------------------------------------------------------------------------------------------------


def test_values_are_weighted_and_kept_by_name(pool: Pool, file: Path) -> None:
    graders = pool(function={f"{file}:length": 2.0, f"{file}:same": -1.0}, correct_at=1.0)
    texts = [" yes\n", "yes", "yes" * 3]  # not stripped: a format reward must see the text itself
    short, right, long = graders.grade([(text, verifier(wanted="yes")) for text in texts])
    assert (short.parts, short.value, short.correct) == ({"length": 0.5, "same": 0.0}, 1.0, True)
    assert (right.parts, right.correct) == ({"length": 0.3, "same": 1.0}, False)
    assert right.value == pytest.approx(-0.4) and long.value == pytest.approx(1.8)


def test_a_function_may_say_itself_what_is_correct(pool: Pool) -> None:
    wrong, right = pool("length", "judged").grade([(text, verifier()) for text in ("a" * 90, "right")])
    assert (wrong.value, wrong.correct) == (9.25, False)
    assert (right.value, right.correct) == (0.75, True)


def test_each_gets_a_record_of_its_own(pool: Pool, file: Path) -> None:
    shared = verifier(wanted="x")
    graders = pool(function={f"{file}:shared": 1.0, f"{file}:same": 1.0})
    rewards = graders.grade([("x", shared), ("y", shared)])
    assert [r.parts for r in rewards] == [{"shared": 1.0, "same": 1.0}, {"shared": 1.0, "same": 0.0}]


def test_what_is_no_number_is_an_error_that_names_the_record(pool: Pool) -> None:
    graders = pool("odd", incorrect=-2.0)
    for text, problem in (
        ("none", "TypeError: returned None; return a number, or (number, is correct)"),
        ("nan", "ValueError: returned nan; a reward must be a number between -1e+06 and 1e+06"),
        ("large", "ValueError: returned 1000000000.0; "),
        ("text", "TypeError: returned 'one'"),
        ("missing", "KeyError: 'missing'"),
    ):
        (reward,) = graders.grade([(text, verifier())])
        assert reward == Reward(-2.0, correct=False)
        assert graders.last_error.startswith(f"record 7 of x.jsonl: odd: {problem}")
    assert graders.errors == 5
    assert graders.grade([("numeral", verifier())])[0].value == 1.5


def test_one_that_hangs_costs_its_response_only(pool: Pool) -> None:
    before, lost, after = pool("hangs", timeout_s=0.5).grade([(text, verifier()) for text in ("a", "hang", "b")])
    assert (before.value, after.value) == (1.0, 1.0)
    assert lost == Reward(0.0, correct=False, timed_out=True)


def test_failing_on_a_whole_batch_ends_the_run(pool: Pool) -> None:
    with pytest.raises(ReheatError, match=r"failed on all of 16 responses: .*record 7 of x\.jsonl: same: KeyError"):
        pool("same").grade([(str(i), verifier()) for i in range(16)])


def test_they_are_tried_before_the_first_step(pool: Pool, file: Path) -> None:
    try_functions(pool("length"), [verifier()])
    with pytest.raises(ConfigError, match=r"empty response to record 1: odd: KeyError: ''; it must return a number"):
        try_functions(pool("odd"), [verifier("record 1")])
    stuck = file.parent / "stuck.py"
    stuck.write_text("import time\ndef f(response, record):\n    time.sleep(60)\n")
    with pytest.raises(ConfigError, match=r"record 7 of x\.jsonl: no answer within reward\.timeout_s"):
        try_functions(pool(function=f"{stuck}:f", timeout_s=0.2), [verifier()])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_like_it\ndef f(a, b): ...", "ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("import sys\nsys.exit(3)\nf = 1", "SystemExit: 3"),
        ("f = 3", r"has no function 'f'"),
    ],
)
def test_a_file_that_cannot_be_imported_ends_the_start(pool: Pool, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"^reward\.function: .*bad\.py .*{message}"):
        pool(function=f"{path}:f").grade([("", verifier())])


# -- what they may do --------------------------------------------------------------------------------------------------


@pytest.fixture
def port() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        yield server.server_port


def test_the_sandbox_keeps_them_in(pool: Pool, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "secret")
    for name, text in (("network", str(port)), ("child", ""), ("writes", str(tmp_path / "out"))):
        graders = pool(name)
        (reward,) = graders.grade([(text, verifier())])
        assert not reward.correct and (graders.errors or reward.timed_out), name
    assert not (tmp_path / "out").exists()
    assert pool("environment").grade([("MY_TOKEN", verifier())])[0].value == 0


def test_without_it_they_may_do_what_a_process_may(
    pool: Pool, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "secret")
    monkeypatch.setenv("RANK", "0")
    for name, text in (
        ("network", str(port)),
        ("child", ""),
        ("writes", str(tmp_path / "out")),
        ("environment", "MY_TOKEN"),
    ):
        assert pool(name, sandbox=False).grade([(text, verifier())])[0].value == 1.0, name
    assert (tmp_path / "out").read_text() == "kept"
    assert pool("environment", sandbox=False).grade([("RANK", verifier())])[0].value == 0


# -- groups and examples -----------------------------------------------------------------------------------------------


def test_a_group_is_uniform_when_its_rewards_are() -> None:
    prompt = Prompt(0, "", (1,), {})
    completion = Completion(np.array([1], np.int32), np.zeros(1, np.float32), 1.0, 0, "stop")

    def group(*values: float) -> Group:
        return Group(prompt, (completion,) * len(values), tuple(Reward(v, correct=False) for v in values))

    assert group(0.5, 0.5).is_uniform and not group(0.5, 0.25).is_uniform


def test_no_function_can_hide_what_every_run_logs() -> None:
    completion = Completion(np.array([1], np.int32), np.zeros(1, np.float32), 1.0, 0, "stop")
    group = Group(Prompt(0, "", (1,), {}), (completion,), (Reward(1.0, correct=True),))
    logged = {name.partition("/")[2] for name in rollout_metrics([group]) if name.startswith("reward/")}
    assert logged == LOGGED_REWARDS and MAX_VALUE == MAX_REWARD


def test_the_example_gives_credit_for_coming_close() -> None:
    record = {"metadata": {"numbers": [3, 8, 1], "target": 24}}
    assert closeness("3*8*1", record) == (1.0, True)
    for right in ("(3*8*1)", "8*(1*3)"):
        assert closeness(right, record) == (1.0, True)
    for no_number in ("3(8)*1", "()", "3(8)(1)", "(" * 40):
        assert closeness(no_number, record) == (0.0, False)
    assert closeness(" 3*8+1 \n", record) == (pytest.approx(24 / 25), False)
    for useless in ("", "24", "3*8", "3**8*1", "3*8/0", "3*8*1 or 7", "__import__('os')"):
        assert closeness(useless, record) == (0.0, False)
    assert (brevity("", {}), brevity("x" * 16, {}), brevity("x" * 99, {})) == (1.0, 0.75, 0.0)


def test_the_example_of_a_judge_asks_an_openai_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in answers what such a server would; what is tested is the example."""
    asked: list[dict[str, Any]] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(
                {"object": "list", "data": [{"id": "the-judge", "object": "model", "created": 0, "owned_by": "me"}]}
            )

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            said = (
                "9" if "right" in asked[-1]["messages"][0]["content"].rpartition("Response:")[2] else "about 3.5 points"
            )
            message = {"role": "assistant", "content": said}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.reply(
                {"id": "1", "object": "chat.completion", "created": 0, "model": "the-judge", "choices": [choice]}
            )

        def reply(self, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{server.server_port}/v1")
        config = RewardConfig(
            function=f"{os.path.abspath(judge.__file__)}:judge", sandbox=False, workers=1, timeout_s=30
        )
        with VerifierPool(config) as pool:
            record = verifier(question="1+1?", answer="2")
            good, poor = pool.grade([("right: 2", record), ("3", record)])
        server.shutdown()
    assert (good.value, good.correct, poor.value, poor.correct) == (0.9, True, 0.35, False)
    assert (
        asked[0]["model"] == "the-judge" and "Problem: 1+1?\nReference answer: 2" in asked[0]["messages"][0]["content"]
    )
