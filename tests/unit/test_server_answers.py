"""Which answers of servers count: those whose every token was sampled by the weights that were sent, by the label it bears;
and servers that do not answer."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_reheat.config import RolloutConfig
from megatron_reheat.errors import EngineDied, EngineStuck, ReheatError, WeightSyncError
from megatron_reheat.rollout.server import client
from megatron_reheat.rollout.server.client import ServerInfo
from megatron_reheat.rollout.server.fleet import ServerFleet
from megatron_reheat.rollout.server.servers import Servers
from megatron_reheat.rollout.server.weights import FRESH
from megatron_reheat.types import Completion, SamplingParams

PROMPTS = [[3], [4], [5]]
INFO = ServerInfo("0.32.0", "policy", 64, None, "processed_logprobs", "gloo", 1)

Start = Callable[..., ServerFleet]


@pytest.fixture
def start() -> Iterator[Start]:
    """A fleet of version 7 of run `ours`, over one server for each list: the labels of the spans of all its answers."""
    opened: list[ThreadingHTTPServer] = []
    fleets: list[ServerFleet] = []

    def make(*labels: list[str]) -> ServerFleet:
        urls = []
        for number, spans in enumerate(labels):
            choice = {
                "index": 0, "token_ids": [number], "logprobs": {"content": [{"logprob": -1.0}]}, "finish_reason": "stop",
                "weight_versions": [{"version": label, "start": 0, "end": 1} for label in spans],
            }  # fmt: skip

            class Handler(BaseHTTPRequestHandler):
                body = json.dumps({"choices": [choice]}).encode()

                def do_POST(self) -> None:
                    self.rfile.read(int(self.headers["Content-Length"]))
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(self.body)))
                    self.end_headers()
                    self.wfile.write(self.body)

                def log_message(self, *_: object) -> None: ...

            opened.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            threading.Thread(target=opened[-1].serve_forever, args=(0.02,), daemon=True).start()
            urls.append(f"http://127.0.0.1:{opened[-1].server_port}")
        config = RolloutConfig(timeout_s=20)
        servers = Servers(urls, {}, config, None, "gloo")  # type: ignore[arg-type]
        servers.info, servers._start_seconds = dict.fromkeys(urls, INFO), 0.0
        fleets.append(ServerFleet(servers, 64, config, label="ours", weights=None))
        fleets[-1].adopt(7)
        return fleets[-1]

    yield make
    for fleet in fleets:
        fleet.close()
    for server in opened:
        server.shutdown()


def sample(fleet: ServerFleet) -> list[int]:
    """The numbers of the servers that answered."""
    groups = fleet.generate(PROMPTS, SamplingParams(temperature=1.0, max_tokens=4), 1, 0)
    return [int(completion.token_ids[0]) for group in groups for completion in group]


@pytest.mark.parametrize("held", [[FRESH], ["ours-6"], ["ours-7", FRESH], ["ours-6", "ours-7"]])
def test_a_server_without_the_weights_of_now_is_as_good_as_dead(start: Start, held: list[str]) -> None:
    fleet = start(held, ["ours-7"])
    assert sample(fleet) == [1, 1, 1]
    assert fleet.policy_version is None  # before anything else is sampled, weights are sent again
    with pytest.raises(EngineDied, match="was started again and has lost its weights"):
        sample(start(held))


@pytest.mark.parametrize("held", [[], ["theirs-7"], ["unfinished"], ["ours-7", "theirs-1"], [FRESH, "theirs-1"]])
def test_weights_that_are_not_ours_to_replace_end_the_run(start: Start, held: list[str]) -> None:
    with pytest.raises(WeightSyncError, match=r"holds weights \[.*\] instead of ours-7"):
        sample(start(held))


def test_each_completion_is_handed_over_once_in_the_callers_thread(start: Start) -> None:
    """A request of its own each, also where those of a server that has lost its weights go to the other."""
    fleet, taken = start(["ours-6"], ["ours-7"]), []

    def take(prompt: int, sample: int, completion: Completion) -> None:
        assert threading.current_thread() is threading.main_thread()
        taken.append((prompt, sample, completion))

    groups = fleet.generate(PROMPTS, SamplingParams(temperature=1.0, max_tokens=4), 2, 0, take)
    assert sorted((p, i) for p, i, _ in taken) == [(p, i) for p in range(3) for i in range(2)]
    assert all(groups[p][i] is completion for p, i, completion in taken)


def test_one_that_accepts_and_never_answers_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for wait in ("ANSWER_WAIT_S", "STRANGER_WAIT_S"):
        monkeypatch.setattr(client, wait, 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = RolloutConfig(timeout_s=0.2, start_timeout_s=0.4, max_restarts=1)
        servers = Servers([url], {}, config, None, "gloo")  # type: ignore[arg-type]
        late = rf"vLLM server {url} is not ready after 0\.4 s \(rollout\.start_timeout_s\)"
        with pytest.raises(ReheatError, match=late):
            servers.wait_ready()
        with pytest.raises(EngineStuck, match=r"did not answer /weight_info within 0\.2 s \(rollout\.timeout_s\)"):
            servers.network.run(servers.clients[url].weights_label())
        with pytest.raises(ReheatError, match=late):
            servers.restart()
        with pytest.raises(EngineDied, match=r"has had its 1 restarts within an hour \(rollout\.max_restarts\)"):
            servers.restart()
        servers.close()


def test_one_that_closes_idle_connections_is_not_taken_for_dead() -> None:
    """As uvicorn does after five seconds, here as soon as a second request comes over the same connection."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()
            if self.rfile.peek(1):
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    servers = Servers([url], {}, RolloutConfig(timeout_s=20), None, "gloo")  # type: ignore[arg-type]
    try:
        for _ in range(3):
            servers.network.run(servers.clients[url].post("pause"))
    finally:
        servers.close()
        server.shutdown()
        server.server_close()
