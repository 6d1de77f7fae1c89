"""`reheat serve` with two real vLLM servers that are killed and stopped, and a trainer that notices and goes on.

What dies while it samples, or while weights are sent to it, is in `test_server_fleet`: the trainer's part is the same.
"""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_reheat.ports import free_port
from megatron_reheat.recipe import load_config
from megatron_reheat.rollout.server.process import transfer_backend
from megatron_reheat.rollout.server.servers import Servers
from megatron_reheat.rollout.server.weights import FRESH
from tests.e2e import runs
from tests.e2e.agreement import PushedModel
from tests.e2e.server_kills import LIMIT_S, Trainer, one_dead_and_one_stopped
from tests.tiny_models import save_tiny_model


class Served(PushedModel):
    """The command, and a trainer elsewhere that has been given its servers."""

    def __init__(self, folder: Path) -> None:
        model = save_tiny_model("qwen3_tied", folder / "model")
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        rollout = {
            "mode": "server", "max_tokens": 32, "max_num_seqs": 8, "enforce_eager": True, "kv_cache_mb": 64, "threads": 1,
            "timeout_s": LIMIT_S, "start_timeout_s": LIMIT_S, "max_restarts": 9,
        }  # fmt: skip
        tree = {
            "model": {"hf_path": str(model), "dtype": "float32"},
            "data": {"path": "p.jsonl", "max_prompt_tokens": 64},
            "rollout": rollout,
            "reheat": {"max_tokens": 32},
            "run": {"folder": str(folder / "run")},
        }
        recipe = runs.write_recipe(tree, folder / "recipe.yaml")
        port = free_port()
        self.urls = [f"http://127.0.0.1:{port + k}" for k in range(2)]
        self.command = runs.start("serve", str(recipe), "--port", str(port), "--servers", "2")
        try:
            hf = AutoConfig.from_pretrained(model)
            config = load_config(recipe).rollout.model_copy(update={"max_model_len": 96})
            self.servers = Servers(self.urls, {}, config, hf, transfer_backend(True))
            self.trainer = Trainer(self, self.servers, hf.vocab_size, config)
        except BaseException:
            self.end()
            raise

    def end(self) -> tuple[str, str]:
        """Its output, once everything that it had started is gone."""
        started = [psutil.Process(self.command.pid)] if self.command.poll() is None else []
        started += [child for one in started for child in one.children(recursive=True)]
        self.command.send_signal(signal.SIGTERM)
        try:
            output, errors = self.command.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            runs.kill(self.command)
            raise
        _, alive = psutil.wait_procs(started, timeout=10)
        for one in alive:
            one.kill()
        assert alive == []
        return output, errors


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("served"))
    try:
        yield served
        served.trainer.fleet.close()
    finally:
        if served.command.poll() is None:
            served.end()


def test_one_that_dies_between_steps_while_the_other_hangs(served: Served) -> None:
    one_dead_and_one_stopped(served.trainer, served.trainer.kill_guardian, *served.urls)


def test_nothing_is_sampled_with_the_weights_of_a_new_start(served: Served) -> None:
    """The server is back, and would sample from random weights, before the trainer has noticed anything."""
    trainer, url = served.trainer, served.urls[0]
    trainer.publish(2)
    trainer.kill(url)
    trainer.wait_for_another(url)
    (choice,) = trainer.ask(url, 0, 1)["choices"]
    assert choice["token_ids"] != trainer.expected[2][0][0] and choice["weight_versions"][0]["version"] == FRESH
    assert not trainer.servers.dead
    assert trainer.sample() == trainer.expected[2]
    assert list(trainer.servers.dead) == [url]
    trainer.publish(1)
    assert trainer.sample() == trainer.expected[1]
    trainer.assert_nothing_is_left()


def test_a_server_without_its_weights_is_found_before_others_are_sent(served: Served) -> None:
    """It has left the group in which they are sent."""
    trainer = served.trainer
    trainer.publish(1)
    restarts = trainer.sampler.engine_restarts
    client = trainer.servers.clients[served.urls[0]]
    trainer.servers.network.run(client.post("update_weight_version", {"new_version": FRESH}))
    trainer.publish(2)
    assert trainer.sampler.engine_restarts == restarts + 1
    assert trainer.sample() == trainer.expected[2]


def test_the_command_tells_of_every_start_and_leaves_nothing(served: Served) -> None:
    output, errors = served.end()
    assert (served.command.returncode, errors) == (0, "")
    lines = [line for line in output.splitlines() if "; started again, number " in line]
    killed, asked = "was killed by signal 9", "exited with code 75, which its trainer asked for"
    for url, reasons in zip(served.urls, ([killed] * 2, [asked]), strict=True):
        why = [line.removeprefix(f"{url} ").partition(";")[0] for line in lines if line.startswith(url)]
        numbers = [re.search(r"number (\d+) of 9 restarts", line)[1] for line in lines if line.startswith(url)]
        assert why.count(reasons[0]) >= len(reasons)
        assert numbers == [str(n) for n in range(1, 1 + len(why))]
    assert output.count(" ready after ") == 2 + len(lines)
    assert output.endswith("servers ended\n")
