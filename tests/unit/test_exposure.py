"""What others can reach, and what is written where others can read it."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from megatron_reheat.analysis.report import write_report
from megatron_reheat.cluster.slurm import JobRequest, make_job
from megatron_reheat.commands.serve import check_exposure, is_loopback
from megatron_reheat.confidential import HIDDEN, TOKEN_VARIABLE, holds_secret, redact, redact_text
from megatron_reheat.config import RolloutConfig
from megatron_reheat.errors import ConfigError, print_error
from megatron_reheat.model.model_card import model_card, plain
from megatron_reheat.recipe import dump_config, load_config
from megatron_reheat.rollout.server.gloo_group import make_store
from megatron_reheat.rollout.server.guard import TokenGuard, server_token
from megatron_reheat.rollout.server.servers import Servers
from megatron_reheat.run_folder import RunFolder, read_config_tree
from megatron_reheat.trackers import WandB

TOKEN = "0123456789abcdef0123"
SECRETS = ("hunter22hunter22", "s3cr3t-pass", "hf_" + "a" * 34, "0" * 39 + "f")
RECIPE = f"""
model: {{hf_path: m}}
data:
  source: datasets
  name: private/set
  options:
    token: {SECRETS[0]}
    data_files: ["https://user:{SECRETS[1]}@host/a.parquet?sig={SECRETS[0]}"]
    storage_options: {{secret: {SECRETS[0]}, nested: {{aws_secret_access_key: {SECRETS[0]}}}, api_key: {SECRETS[0]}}}
eval:
  data: {{path: "https://user:{SECRETS[1]}@host/b.parquet", options: {{use_auth_token: {SECRETS[0]}, revision: {SECRETS[2]}}}}}
logging: {{wandb_project: {SECRETS[3]}}}
run: {{folder: FOLDER}}
"""


def recipe(folder: Path, text: str = RECIPE) -> Path:
    (folder / "recipe.yaml").write_text(text.replace("FOLDER", str(folder / "run")))
    return folder / "recipe.yaml"


def clean(text: str) -> bool:
    return not any(secret in text for secret in SECRETS)


# -- secrets -----------------------------------------------------------------------------------------------------------


def test_nothing_that_a_run_writes_or_sends_holds_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(recipe(tmp_path))
    assert config.data.options["token"] == SECRETS[0]  # the run itself has it
    run = RunFolder(config.run.path)
    run.create(config)
    sent: dict[str, Any] = {}
    tracker = SimpleNamespace(
        init=lambda **given: sent.update(given) or SimpleNamespace(define_metric=lambda *a, **k: None)
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=tracker.init, Error=OSError))
    WandB(config, run)
    assert clean(json.dumps(sent["config"])) and sent["config"]["data"]["options"]["token"] == HIDDEN
    # as an earlier version wrote it
    run.metrics.write_text('{"step": 1, "stage": "rlvr", "round": 0, "policy_version": 1, "entropy/mean": 1.0}\n')
    for text in (run.config.read_text(), recipe(tmp_path).read_text()):
        run.config.write_text(text)
        card = model_card(
            run.path,
            read_config_tree(run.path),
            {},
            name="out",
            has_chat_template=False,
            model_type="llama",
            num_parameters=1,
            dtype="float32",
            verified="",
        )
        assert clean(card) and clean(write_report([run.path]).html.read_text())
    assert clean(dump_config(config)) and "private/set" in dump_config(config)


def test_what_is_no_secret_stays() -> None:
    tree = {
        "data": {
            "prompt_key": "question",
            "max_prompt_tokens": 8,
            "path": "https://host/a?b=c",
            "options": {"tokens": 5, "revision": "a" * 40, "eos_token": "</s>"},
        },
        "chat_template_kwargs": {"enable_thinking": False, "add_generation_prompt": True, "tokenize": "no", "key": "a"},
        "run": {"name": "token", "token": "x"},
    }
    assert redact(tree) == tree
    assert redact({"options": {"token": True, "password": "", "secret": None}}) == {
        "options": {"token": True, "password": "", "secret": None}
    }
    for text in (
        "rollout.max_tokens=60",
        "token '<eos>' has id 5",
        "https://host:80/a@b",
        "git@host:a/b",
        "hf_quant_config_of_a_model.json",
        "sk-learn",
    ):
        assert redact_text(text) == text


def test_an_error_shows_no_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for override in (
        f"rollout.servers=[http://user:{SECRETS[1]}@gpu-7:8300]",
        f"rollout.servers=[http://user:{SECRETS[1]}@gpu-7:99999]",
        f"rollout.servers={{a: {SECRETS[2]}}}",
        f"data.split={{token: {SECRETS[2]}}}",
        f"data.path={{token: {SECRETS[0]}}}",
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(recipe(tmp_path), [override, "rollout.mode=server", "data.size=0"])
        assert clean(str(caught.value)), caught.value
    assert TOKEN_VARIABLE in str(ConfigError(f"x {TOKEN_VARIABLE}"))
    print_error(f"vLLM said: https://user:{SECRETS[1]}@host/ and Authorization: Bearer {SECRETS[0]}\nmore")
    assert (
        capsys.readouterr().err
        == f"error: vLLM said: https://{HIDDEN}@host/ and Authorization: Bearer {HIDDEN}\nmore\n"
    )


@pytest.mark.parametrize(
    "override",
    [
        f"data.options.token={SECRETS[0]}",
        f"data.options={{token: {SECRETS[0]}}}",
        f"eval.data.options.storage_options.secret={SECRETS[0]}",
        f"data.path=https://user:{SECRETS[1]}@host/a.parquet",
        f"logging.wandb_project={SECRETS[3]}",
        f"model.hf_path={SECRETS[2]}",
    ],
)
def test_a_batch_script_is_not_given_a_secret(tmp_path: Path, override: str) -> None:
    assert holds_secret(override.partition("=")[0], override.partition("=")[2])
    request = JobRequest(recipe(tmp_path), nodes=1, cpu_tasks=1, command=["reheat"], overrides=[override])
    with pytest.raises(
        ConfigError, match="holds a secret, which the script would show; give it in the environment"
    ) as caught:
        make_job(request)
    assert clean(str(caught.value))
    assert not holds_secret("rl.group_size", "4") and not holds_secret("data.options", "{min_numbers: 3}")


# -- text in pages and scripts -----------------------------------------------------------------------------------------


def test_names_and_texts_are_shown_as_they_are(tmp_path: Path) -> None:
    name = "<script>alert(1)</script> | ``` _a_ [x](javascript:y)"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(
        yaml.safe_dump({"run": {"name": name}, "model": {"hf_path": "a\n```\n# b"}})
    )
    (tmp_path / "run" / "metrics.jsonl").write_text(
        '{"step": 1, "stage": "rlvr", "round": 0, "policy_version": 1, "entropy/mean": 1.0}\n'
        f"{json.dumps({'step': 1, 'event': '<img src=x onerror=y>'})}\n"
    )
    page = write_report([tmp_path / "run"]).html.read_text()
    assert "<script>" not in page and "<img src=x" not in page and "&lt;script&gt;" in page
    card = model_card(
        tmp_path / "run",
        read_config_tree(tmp_path / "run"),
        {},
        name="out",
        has_chat_template=False,
        model_type="llama",
        num_parameters=1,
        dtype="float32",
        verified="",
        stop_tokens=["<|im_end|>"],
    )
    assert "&lt;\\|im_end\\|&gt;" in card and f"# {plain(name)}, step None" in card
    fence = re.findall("^(`{4,})", card, re.MULTILINE)
    assert len(fence) == 2  # longer than any inside
    outside = card.split(fence[0])[0]
    assert "<script>" not in outside and "\n# b" not in outside and not re.search(r"(?<!\\)\]\(java", outside)
    for row in (line for line in outside.splitlines() if line.startswith("|")):
        assert len(re.findall(r"(?<!\\)\|", row)) in (3, 4)


@pytest.mark.parametrize("option", ["partition", "account", "time", "container", "venv", "logs"])
def test_an_option_is_one_line_of_the_script(tmp_path: Path, option: str) -> None:
    value: Any = "1:00\n#SBATCH --uid=0"
    request = JobRequest(recipe(tmp_path), nodes=1, cpu_tasks=1, command=["reheat"], **{option: value})
    with pytest.raises(ConfigError, match=f"--{option} must not hold line breaks"):
        make_job(request)


# -- servers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "own"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("gpu-7", False), ("", False)],
)  # fmt: skip
def test_a_host_that_others_reach_needs_a_token(monkeypatch: pytest.MonkeyPatch, host: str, own: bool) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert is_loopback(host) == own
    if own:
        check_exposure(host)
    else:
        with pytest.raises(
            ConfigError, match=f"--host {host} can be reached from other machines.*set {TOKEN_VARIABLE}"
        ):
            check_exposure(host)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    check_exposure(host)


@pytest.mark.parametrize("token", ["short", "has a space in it, see", "line\nbreak-line-break", "é" * 20])
def test_a_token_is_long_and_fits_a_header(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    with pytest.raises(ConfigError, match=f"{TOKEN_VARIABLE} must be 16 or more letters") as caught:
        server_token()
    assert token not in str(caught.value)


def answer(path: str, headers: list[tuple[bytes, bytes]], kind: str = "http") -> Any:
    """The status, or the code of a closed socket, or `passed`."""
    sent: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        sent.append("passed")

    async def send(message: Any) -> None:
        sent.append(message.get("status") or message.get("code"))

    async def receive() -> None: ...

    scope = {"type": kind, "path": path, "headers": headers, "method": "POST"}
    asyncio.run(TokenGuard(application)(scope, receive, send))  # type: ignore[arg-type]
    return sent[0]


def test_the_guard_lets_the_token_pass_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    right = (b"authorization", f"Bearer {TOKEN}".encode())
    assert answer("/pause", [right]) == answer("/health", []) == "passed"
    for headers in (
        [],
        [(b"authorization", TOKEN.encode())],
        [(b"authorization", b"Bearer ")],
        [right, right],
        [(b"x-key", right[1])],
    ):
        assert answer("/pause", headers) == answer("/health/", headers) == 401
    assert answer("/v1/realtime", [], "websocket") == 1008 and answer("/v1/realtime", [right], "websocket") == "passed"
    assert answer("", [], "lifespan") == "passed"
    monkeypatch.delenv(TOKEN_VARIABLE)
    with pytest.raises(RuntimeError, match="not set"):
        TokenGuard(lambda scope, receive, send: None)  # type: ignore[arg-type,return-value]


@contextmanager
def http_server(respond: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            respond(self)

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def reply(status: int, body: str = "", **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body.encode())

    return respond


@pytest.mark.parametrize(
    ("respond", "words"),
    [
        (reply(404), "is no vLLM server: it answered 404 to /health; start one there"),
        (reply(302, Location="http://elsewhere.invalid/"), "it answered 302 to /health"),
        (reply(200, "<html>hello</html>"), "its /version tells none"),
        (reply(200, '{"version": 3}'), "its /version tells none"),
        (reply(200, "[]"), "its /version tells none"),
        (lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH\r\n\r\n"), "its answer is not HTTP"),
        (lambda h: reply(200 if h.path == "/health" else 401)(h), "asks for a token, and REHEAT_SERVER_TOKEN is not set here"),
    ],
)  # fmt: skip
def test_what_is_no_vllm_server_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, respond: Callable[[BaseHTTPRequestHandler], None], words: str
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with http_server(respond) as url, pytest.raises(ConfigError) as caught:
        Servers([url], {}, RolloutConfig(), None, "any")  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"rollout.servers: {url} ") and words in str(caught.value)


@pytest.mark.parametrize("status", [None, 503])
def test_a_server_that_is_not_up_yet_is_waited_for(status: int | None) -> None:
    """Nothing listens, or it says that it is not ready: no reason to refuse it."""
    with http_server(reply(status or 500)) as url:
        Servers([url if status else "http://127.0.0.1:1"], {}, RolloutConfig(), None, "any").close()  # type: ignore[arg-type]


def test_the_weights_store_listens_where_the_servers_are() -> None:
    store = make_store(0, 1, 10, host="127.0.0.1", is_master=True)
    with socket.socket() as other:
        other.bind(("127.0.0.2", store.port))  # which a store on every interface would have taken
    store.set("a", "b")
    assert make_store(store.port, 1, 10, host="127.0.0.1", is_master=False).get("a") == b"b"
