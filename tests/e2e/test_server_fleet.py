"""`server` mode: two real vLLM servers, fed and asked over HTTP, against the embedded engine and transformers."""

from __future__ import annotations

import dataclasses
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_reheat.config import RolloutConfig
from megatron_reheat.errors import ConfigError, ReheatError, WeightSyncError
from megatron_reheat.ports import free_port
from megatron_reheat.rollout.embedded import EmbeddedEngine
from megatron_reheat.rollout.server.fleet import ServerFleet
from megatron_reheat.rollout.server.guard import own_token
from megatron_reheat.rollout.server.process import ServerProcess, transfer_backend
from megatron_reheat.rollout.server.servers import Servers
from megatron_reheat.rollout.server.weights import ServerWeights
from megatron_reheat.rollout.weight_sync import WeightSync
from megatron_reheat.types import SamplingParams
from tests.e2e.agreement import GREEDY, TOLERANCE, PushedModel
from tests.e2e.server_kills import LIMIT_S, Trainer, api_process, die_in_turn, one_dead_and_one_stopped, wait_until
from tests.tiny_models import save_tiny_model

CONFIG = RolloutConfig(
    max_model_len=256,
    max_num_seqs=8,
    enforce_eager=True,
    kv_cache_mb=64,
    threads=1,
    timeout_s=LIMIT_S,
    start_timeout_s=LIMIT_S,
    max_restarts=4,
)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=24)
PROMPTS = [[2 + (5 * i + 3 * j) % 120 for j in range(6 + i)] for i in range(12)]
LONG_PROMPT = [2 + (7 * j) % 120 for j in range(200)]  # longer than a KV block of 128, so that prefixes are cached


class Rig(PushedModel):
    """A tiny model with a tied head, and what is needed to talk to its two servers."""

    def __init__(self, folder: Path) -> None:
        self.folder = save_tiny_model("qwen3_tied", folder / "model")
        self.hf = AutoConfig.from_pretrained(self.folder)
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.processes: dict[str, ServerProcess] = {}
        self.urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
        self.token = own_token()
        self.servers = self.connect(self.urls, {url: self._starter(url, folder) for url in self.urls})
        self.weights = ServerWeights(self.servers, CONFIG, on_cpu=True)
        self.fleet = ServerFleet(self.servers, self.hf.vocab_size, CONFIG, label="run", weights=self.weights)
        self.sync = WeightSync(self.fleet, CONFIG)

    def _starter(self, url: str, folder: Path) -> Callable[[], ServerProcess]:
        port = int(url.rsplit(":", 1)[1])

        def start() -> ServerProcess:
            self.processes[url] = ServerProcess(
                str(self.folder),
                self.hf,
                CONFIG,
                dtype="float32",
                seed=0,
                port=port,
                log_file=folder / f"{port}.log",
                token=self.token,
            )
            return self.processes[url]

        return start

    def connect(self, urls: list[str], starters: dict[str, Callable[[], ServerProcess]] | None = None) -> Servers:
        return Servers(urls, starters or {}, CONFIG, self.hf, transfer_backend(True), token=self.token)

    def ready(self) -> ServerFleet:
        if self.fleet.policy_version is None:
            self.push()
        return self.fleet

    def only(self, url: str) -> ServerFleet:
        """A fleet of one of the servers, for a look at it alone."""
        servers = self.connect([url])
        fleet = ServerFleet(servers, self.hf.vocab_size, CONFIG, label="run", weights=None)
        fleet.adopt(self.version)
        return fleet

    def assert_agrees(self, fleet: ServerFleet, prompts=PROMPTS) -> None:
        self.assert_samples_alike(fleet, prompts)


@pytest.fixture(scope="module")
def rig(tmp_path_factory) -> Iterator[Rig]:
    rig = Rig(tmp_path_factory.mktemp("servers"))
    try:
        wait_until(lambda: api_process(rig.urls[0]) is not None)
        api_process(rig.urls[0]).kill()  # it is started again, which costs one of its restarts
        rig.fleet.wait_ready()
        yield rig
    finally:
        rig.fleet.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(p.alive for p in rig.processes.values()):
        time.sleep(0.1)
    assert not any(p.alive for p in rig.processes.values())


def test_nothing_is_sampled_before_the_first_sync(rig: Rig) -> None:
    with pytest.raises(WeightSyncError, match="hold no complete weights"):
        rig.fleet.generate(PROMPTS, GREEDY, n=1, seed=0)


def test_both_servers_hold_what_was_sent(rig: Rig) -> None:
    for seed in (1, 2):
        rig.randomize(seed)
        report = rig.push()
        assert (report.version, report.num_tensors) == (rig.version, len(rig.tensors()))
        assert report.num_bytes == sum(t.nbytes for _, t in rig.tensors())
        assert report.verified == (seed == 1)
        for url in rig.urls:
            rig.assert_agrees(rig.only(url))


def test_a_sync_drops_cached_prefixes(rig: Rig) -> None:
    for seed in (3, 4):
        rig.randomize(seed)
        rig.push()
        for url in rig.urls:
            rig.assert_agrees(rig.only(url), [LONG_PROMPT])


def test_many_small_buckets_arrive_as_one_update(rig: Rig) -> None:
    rig.randomize(5)
    small = CONFIG.model_copy(update={"sync_bucket_mb": 0})  # every tensor a bucket of its own
    rig.weights._config = small
    try:
        rig.push()
    finally:
        rig.weights._config = CONFIG
    rig.assert_agrees(rig.fleet)


def test_the_samples_are_the_embedded_engines(rig: Rig, tmp_path: Path) -> None:
    fleet = rig.ready()
    engine = EmbeddedEngine(str(rig.folder), CONFIG, dtype="float32", log_file=tmp_path / "engine.log")
    try:
        engine.update_weights(rig.tensors(), rig.version, verify=False)
        expected = engine.generate(PROMPTS, SAMPLED, n=3, seed=7)
    finally:
        engine.close()
    taken: list[tuple[int, int]] = []
    apart = fleet.generate(PROMPTS, SAMPLED, 3, 7, lambda prompt, sample, _: taken.append((prompt, sample)))
    assert sorted(taken) == [(p, i) for p in range(len(PROMPTS)) for i in range(3)]
    both = [fleet.generate(PROMPTS, SAMPLED, n=3, seed=7), apart]
    for ours, theirs in [pair for found in both for pair in zip(found, expected, strict=True)]:
        assert [c.token_ids.tolist() for c in ours] == [c.token_ids.tolist() for c in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert np.abs(a.rollout_logprobs - b.rollout_logprobs).max() <= TOLERANCE
            assert a.finish_reason == b.finish_reason


def test_prompts_are_spread_over_both_servers(rig: Rig) -> None:
    fleet = rig.ready()
    before = [_prompts_served(rig, url) for url in rig.urls]
    fleet.generate(PROMPTS, SAMPLED, n=2, seed=0)
    served = [_prompts_served(rig, url) - b for url, b in zip(rig.urls, before, strict=True)]
    assert sum(served) == 2 * len(PROMPTS) and min(served) >= len(PROMPTS) // 2


def test_wrong_tensors_are_named_and_the_next_sync_repairs(rig: Rig) -> None:
    rig.randomize(6)
    wrong = [(n, t[:-1] if n.endswith("layers.1.mlp.up_proj.weight") else t) for n, t in rig.tensors()]
    with pytest.raises(WeightSyncError, match=r"layers\.1\.mlp\.up_proj\.weight has shape \(79, 48\)"):
        rig.push(wrong)
    assert rig.fleet.policy_version is None
    with pytest.raises(WeightSyncError, match="hold no complete weights"):
        rig.fleet.generate(PROMPTS, GREEDY, n=1, seed=0)
    with pytest.raises(WeightSyncError, match=r"did not send these parameters: model\.norm\.weight"):
        rig.push([(n, t) for n, t in rig.tensors() if n != "model.norm.weight"])
    assert rig.push().verified
    rig.assert_agrees(rig.fleet)


def test_a_tensor_that_changes_on_the_way_is_named(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_reheat.rollout.server import sender as weight_sender

    def send_noise(self, packed, has_failed) -> None:
        packed[0][-64:] += 1
        self._group.broadcast(packed[0])

    rig.push()
    with monkeypatch.context() as patch:
        patch.setattr(weight_sender.GlooSender, "send", send_noise)
        patch.setattr(rig.sync, "_verify_every", 1)
        with pytest.raises(WeightSyncError, match="changed between trainer and engine"):
            rig.push()
    assert rig.push().verified


def test_weights_changed_by_somebody_else_are_noticed(rig: Rig) -> None:
    fleet = rig.ready()
    rig.servers.post("update_weight_version", {"new_version": "another run's"}).result()
    with pytest.raises(WeightSyncError, match="another run's"):
        fleet.generate(PROMPTS, GREEDY, n=1, seed=0)
    with pytest.raises(WeightSyncError, match="another run's"):
        rig.push()
    rig.push()
    rig.assert_agrees(rig.fleet)


def test_servers_that_a_dead_trainer_left_in_an_update_take_the_next_ones(rig: Rig) -> None:
    rig.ready()
    rig.servers.post("pause?mode=wait").result()
    rig.servers.post("start_weight_update").result()
    servers = rig.connect(rig.urls)
    fleet = ServerFleet(
        servers, rig.hf.vocab_size, CONFIG, label="next", weights=ServerWeights(servers, CONFIG, on_cpu=True)
    )
    rig.randomize(9)
    rig.version = 1
    assert WeightSync(fleet, CONFIG).push(rig.tensors(), 1).verified
    rig.assert_agrees(fleet)
    fleet.close()
    rig.weights.disconnect()
    rig.push()
    rig.assert_agrees(rig.fleet)


def test_prompts_that_cannot_be_served_are_refused(rig: Rig) -> None:
    fleet = rig.ready()
    with pytest.raises(ConfigError, match="prompt 1 has 256 tokens"):
        fleet.generate([[3], [3] * 256], GREEDY, n=1, seed=0)
    with pytest.raises(ConfigError, match="prompt 0 holds token id 131"):
        fleet.generate([[131]], GREEDY, n=1, seed=0)


def test_a_server_of_another_kind_is_refused(rig: Rig, tmp_path: Path) -> None:
    rig.ready()
    other = AutoConfig.from_pretrained(rig.folder)
    other.num_hidden_layers = 7
    for hf, config, backend, message in (
        (other, CONFIG, transfer_backend(True), "num_hidden_layers 4, .*but model.hf_path has .*num_hidden_layers 7"),
        (rig.hf, CONFIG, transfer_backend(False), "takes weights over reheat_gloo, this trainer sends them over nccl"),
        (rig.hf, CONFIG.model_copy(update={"max_model_len": 512}), transfer_backend(True), "a context of 256 tokens"),
    ):
        servers = Servers(rig.urls[:1], {}, config, hf, backend, token=rig.token)
        with pytest.raises(ConfigError, match=message):
            servers.wait_ready()
        servers.close()


def test_a_server_of_an_old_vllm_is_refused(rig: Rig) -> None:
    rig.ready()
    url = rig.urls[0]
    with pytest.raises(ConfigError, match=r"runs vLLM 0\.31\.0"):
        rig.servers._check(url, dataclasses.replace(rig.servers.info[url], version="0.31.0"))


def test_a_server_that_is_not_there_is_named() -> None:
    config = CONFIG.model_copy(update={"start_timeout_s": 0.5})
    servers = Servers([f"http://127.0.0.1:{free_port()}"], {}, config, None, "any")
    with pytest.raises(ReheatError, match=r"is not ready after 0\.5 s.*rollout\.servers"):
        servers.wait_ready()
    servers.close()


@pytest.fixture(scope="module")
def trainer(rig: Rig) -> Trainer:
    return Trainer(rig, rig.servers, rig.hf.vocab_size, CONFIG)


def test_one_that_dies_while_sampling_and_again_while_weights_are_sent(rig: Rig, trainer: Trainer) -> None:
    die_in_turn(trainer, rig.urls[0])


def test_one_that_dies_between_steps_while_the_other_hangs(rig: Rig, trainer: Trainer) -> None:
    one_dead_and_one_stopped(trainer, trainer.kill, *rig.urls)


def _prompts_served(rig: Rig, url: str) -> float:
    """vLLM's own count of sequences it has finished."""
    request = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {rig.token}"})
    text = urllib.request.urlopen(request).read().decode()
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:request_success_total"))
