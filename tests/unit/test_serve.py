"""`reheat serve`: what it refuses before anything is started, and which GPUs each server gets."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_reheat.commands.serve import check_ports, divide_gpus, serve, stop_on_signals, visible_gpus
from megatron_reheat.errors import ConfigError
from megatron_reheat.ports import free_port
from megatron_reheat.recipe import load_config
from megatron_reheat.rollout.module_process import log_tail
from tests.tiny_models import save_tiny_model


@pytest.mark.parametrize(
    ("gpus", "servers", "tensor", "shares"),
    [
        ("0123", None, 1, ["0", "1", "2", "3"]),
        ("0123", None, 2, ["01", "23"]),
        ("01234", None, 2, ["01", "23"]),  # one stays unused
        ("4567", 1, 2, ["45"]),
        ("", None, 1, [""]),
        ("", 3, 1, ["", "", ""]),
    ],
)
def test_every_server_has_gpus_of_its_own(gpus: str, servers: int | None, tensor: int, shares: list[str]) -> None:
    assert divide_gpus(gpus, servers, tensor) == [tuple(share) for share in shares]


@pytest.mark.parametrize(
    ("gpus", "servers", "tensor", "words"),
    [
        ("01", 0, 1, "--servers 0 must be at least 1"),
        ("01", 2, 2, "--servers 2 x rollout.tensor 2 need 4 GPUs, this machine has 2"),
        ("01", None, 4, "rollout.tensor 4 exceeds the 2 GPUs of this machine"),
    ],
)
def test_too_few_gpus_are_named(gpus: str, servers: int | None, tensor: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        divide_gpus(gpus, servers, tensor)


def test_gpus_go_by_the_names_the_environment_has_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-8f")
    assert visible_gpus() == ("4", "GPU-8f")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == ()


def test_ports_are_checked_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host in ("127.0.0.1", "0.0.0.0"):
            with pytest.raises(ConfigError, match=f"--port: {port} is in use"):
                check_ports(host, port, 1)
            with pytest.raises(ConfigError, match=r"--port: \d+ is in use"):
                check_ports(host, port - 1, 2)
    check_ports("127.0.0.1", port, 1)
    for wrong, count in ((0, 1), (65535, 2)):
        with pytest.raises(ConfigError, match=f"--port {wrong}: {count} servers need ports within 1 to 65535"):
            check_ports("127.0.0.1", wrong, count)
    with pytest.raises(ConfigError, match=r"--host 192\.0\.2\.1 --port .* cannot be listened on"):
        check_ports("192.0.2.1", port, 1)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.max_model_len=512"], ["rollout.max_model_len 512", "256"]),
        (["model.hf_path=/nowhere/model"], ["model.hf_path", "/nowhere/model"]),
    ],
)
def test_a_recipe_that_cannot_be_served_is_refused(overrides: list[str], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        serve(load_config(recipe(tmp_path), overrides), host="127.0.0.1", port=free_port())
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_log_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    with pytest.raises(ConfigError, match=r"recipe\.yaml/below cannot be made: .*; change --log-folder"):
        serve(load_config(path), host="127.0.0.1", port=free_port(), log_folder=path / "below")


def test_the_tail_of_a_log_is_the_reason_of_the_end(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    leaks = "nanobind: leaked 514 functions!\n" + ' - leaked function "a"\n' * 30 + " - ... skipped remainder\n"
    log.write_text(
        "another start's\n" + "INFO\n" * 9 + "EngineDeadError: it died\n" + leaks + "See https://nanobind.x\n"
    )
    tail = log_tail(log, len("another start's\n"))
    assert tail == f"; last lines of {log}:\n" + "  INFO\n" * 7 + "  EngineDeadError: it died"
    assert log_tail(log, log.stat().st_size) == f"; last lines of {log}:\n"


@pytest.mark.parametrize(("before", "ends"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_an_ignored_sigterm_stays_ignored(before: signal.Handlers, ends: bool) -> None:
    """Slurm's scancel signals the servers' nodes too, and the trainer is not done with them."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        signal.signal(signal.SIGTERM, before)
        stop = stop_on_signals()
        # but not by the servers, which are ended by it
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        child.terminate()
        assert child.wait(60) == -signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(0.1) == ends
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(5)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def recipe(folder: Path) -> Path:
    save_tiny_model("llama", folder / "model")
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: {{hf_path: {folder}/model}}\ndata: {{path: p.jsonl, max_prompt_tokens: 64}}\n"
        f"rollout: {{max_tokens: 32}}\nreheat: {{max_tokens: 32}}\nrun: {{folder: {folder}/run}}\n"
    )
    return path
