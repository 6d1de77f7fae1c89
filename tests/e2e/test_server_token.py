"""A real vLLM server on an address that other machines can reach: what it asks of them, and what it leaves behind."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_reheat.confidential import TOKEN_VARIABLE
from megatron_reheat.errors import ConfigError
from megatron_reheat.ports import free_port
from megatron_reheat.rollout.server import process
from megatron_reheat.rollout.server.fleet import ServerFleet
from megatron_reheat.rollout.server.guard import END_ROUTE, server_token
from megatron_reheat.rollout.server.process import ServerProcess, transfer_backend
from megatron_reheat.rollout.server.servers import Servers
from megatron_reheat.rollout.server.weights import ServerWeights
from megatron_reheat.rollout.weight_sync import WeightSync
from tests.e2e import test_server_fleet
from tests.e2e.agreement import PushedModel
from tests.e2e.test_server_fleet import PROMPTS
from tests.tiny_models import save_tiny_model

CONFIG = test_server_fleet.CONFIG.model_copy(update={"start_timeout_s": 900})
TOKEN = secrets.token_hex(24)
CHANGING = {
    "/pause", "/resume", "/update_weights", "/start_weight_update", "/finish_weight_update", "/init_weight_transfer_engine",
    "/shutdown_weight_transfer_engine", "/update_weight_version", "/reset_prefix_cache", "/collective_rpc",
    "/inference/v1/generate",
}  # fmt: skip


def address() -> str | None:
    """One of this machine's that is not its own alone."""
    found = [a.address for own in psutil.net_if_addrs().values() for a in own if a.family == socket.AF_INET]
    return next((a for a in found if not a.startswith("127.")), None)


class Guarded(PushedModel):
    def __init__(self, folder: Path, host: str) -> None:
        self.folder = save_tiny_model("qwen3_tied", folder / "model")
        self.hf = AutoConfig.from_pretrained(self.folder)
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.host, self.port, self.log = host, free_port(), folder / "server.log"
        self.process = ServerProcess(
            str(self.folder),
            self.hf,
            CONFIG,
            dtype="float32",
            seed=0,
            port=self.port,
            log_file=self.log,
            token=server_token(),
            host=host,
        )
        self.servers = self.connect()
        self.servers.wait_ready()
        self.weights = ServerWeights(self.servers, CONFIG, on_cpu=True)
        self.fleet = ServerFleet(self.servers, self.hf.vocab_size, CONFIG, label="run", weights=self.weights)
        self.sync = WeightSync(self.fleet, CONFIG)

    def connect(self) -> Servers:
        url = f"http://{self.host}:{self.port}"
        return Servers([url], {}, CONFIG, self.hf, transfer_backend(True), token=server_token())

    def ask(self, method: str, route: str, token: str | None = None, **headers: str) -> tuple[int, bytes]:
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.request(method, route, body="{}", headers={"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    if (host := address()) is None:
        pytest.skip("this machine has no address but loopback")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOKEN_VARIABLE, TOKEN)
        guarded = Guarded(tmp_path_factory.mktemp("guarded"), host)
        try:
            yield guarded
        finally:
            guarded.process.end()


def test_every_route_asks_for_the_token(server: Guarded) -> None:
    paths = json.loads(server.ask("GET", "/openapi.json", TOKEN)[1])["paths"]
    assert paths.keys() >= CHANGING and "/v1/completions" in paths
    routes = [(method.upper(), path) for path, methods in paths.items() for method in methods]
    routes += [
        ("GET", "/openapi.json"),
        ("GET", "/docs"),
        ("GET", "/metrics"),
        ("POST", "/health/"),
        ("POST", "//pause"),
        ("OPTIONS", "/pause"),
        ("POST", END_ROUTE),
    ]
    for method, path in routes:
        path = path.replace("{", "").replace("}", "")
        for token in (None, "wrong", "", TOKEN[:-1], TOKEN + "0"):
            status, body = server.ask(method, path, token)
            assert status == (200 if path == "/health" else 401), (method, path, token, body)
    assert server.ask("POST", "/pause", **{"X-Authorization": f"Bearer {TOKEN}"})[0] == 401
    assert server.ask("GET", "/health")[0] == 200 and server.ask("GET", "/version", TOKEN)[0] == 200


def test_with_the_token_it_serves_as_ever(server: Guarded) -> None:
    """After all those refused requests: none of them changed anything. The weights come over this machine's other address."""
    server.randomize(3)
    before = listening(psutil.Process())  # what other tests left in this process
    assert server.push().verified
    server.assert_samples_alike(server.fleet, PROMPTS)
    opened = listening(psutil.Process()) - before
    assert opened and {ip for ip, _ in opened} == {server.host}  # the store and the group of the weights
    for one in psutil.Process(server.process.pid).children(recursive=True):
        theirs = {ip for ip, _ in listening(one)}
        assert all(ip == server.host or ip.startswith("127.") for ip in theirs), (one.name(), theirs)


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """Addresses and ports."""
    return {c.laddr for c in process.net_connections() if c.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize(("token", "words"), [("", "is not set here"), ("another-secret-of-48", "is not the server's")])
def test_a_trainer_without_the_token_is_told_at_once(
    server: Guarded, monkeypatch: pytest.MonkeyPatch, token: str, words: str
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    with pytest.raises(ConfigError, match=rf"asks for a token, and {TOKEN_VARIABLE} {words}; set it to"):
        server.connect()


def test_the_token_is_in_no_command_line_and_no_log(server: Guarded) -> None:
    own = psutil.Process(server.process.pid)
    for one in (own, *own.children(recursive=True)):
        assert TOKEN not in " ".join(one.cmdline())
    assert TOKEN not in server.log.read_text()


def test_nothing_is_left_in_shared_memory(server: Guarded) -> None:
    """Also of an engine that was killed, which could not remove its own."""
    session = next(p.pid for p in psutil.Process(server.process.pid).children())
    segments = process._shared_memory(session)
    assert segments and all(path.exists() for path in segments)
    time.sleep(2 * process.LOOK_S)
    for child in psutil.Process(session).children(recursive=True):
        os.kill(child.pid, signal.SIGKILL)
    server.process.end()
    assert not any(path.exists() for path in segments)
    assert server.fleet.policy_version is not None  # it was in use until then
    server.fleet.close()
