"""`reheat serve`: vLLM servers for a recipe's policy on this machine, which a trainer elsewhere names in `rollout.servers`.

The servers start with random weights; the trainer sends its own. Nothing of the model is loaded here.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from megatron_reheat.confidential import TOKEN_VARIABLE
from megatron_reheat.config import Config
from megatron_reheat.errors import ConfigError
from megatron_reheat.model.provider import read_hf_config, resolve_hf_folder
from megatron_reheat.rollout.gpus import visible_gpus
from megatron_reheat.rollout.server.guard import server_token
from megatron_reheat.rollout.server.keeper import Keeper
from megatron_reheat.rollout.server.process import ServerProcess
from megatron_reheat.rollout.vllm_version import require_vllm
from megatron_reheat.run_folder import RunFolder
from megatron_reheat.stages.inputs import context_length

LAST_PORT = 65535
ANY_ADDRESS = ("0.0.0.0", "::")


def serve(config: Config, *, host: str, port: int, servers: int | None = None, log_folder: Path | None = None) -> None:
    """Starts the servers, again where one ends by itself, and returns when it was asked to end them by SIGTERM or SIGINT.

    A SIGTERM that was ignored when this process started stays ignored, as with nohup.

    Args:
        host: interface to listen on.
        port: of the first server; the others follow.
        servers: how many; by default one for every `rollout.tensor` GPUs, and one on a machine without any.
        log_folder: by default the run's logs/.

    Raises:
        ConfigError: the recipe cannot be served here, or a port is taken.
        EngineDied: a server ended before it was ready, was not so within `rollout.start_timeout_s`, or had to be started
            again more than `rollout.max_restarts` times within an hour; the others are ended.
    """
    check_exposure(host)
    require_vllm()
    shares = divide_gpus(visible_gpus(), servers, config.rollout.tensor)
    check_ports(host, port, len(shares))
    model_folder = resolve_hf_folder(config.model)
    hf = read_hf_config(model_folder)
    rollout = config.rollout.model_copy(update={"max_model_len": context_length(config, hf.max_position_embeddings)})
    logs = log_folder or RunFolder(config.run.path).logs
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{logs} cannot be made: {error.strerror}; change --log-folder") from None
    name, token = socket.gethostname(), server_token()
    stop = stop_on_signals()
    starters: dict[str, Callable[[], ServerProcess]] = {}
    for number, gpus in enumerate(shares, start=port):
        url = f"http://{_address(host, name)}:{number}"
        log_file = logs / f"vllm-{name}-{number}.log"
        starters[url] = partial(
            ServerProcess,
            str(model_folder),
            hf,
            rollout,
            dtype=config.model.dtype,
            seed=config.run.seed,
            host=host,
            port=number,
            token=token,
            log_file=log_file,
            gpus=gpus,
            threads=rollout.threads or max(1, len(os.sched_getaffinity(0)) // len(shares)),
        )
        print(f"{url} on {'GPU ' + ','.join(gpus) if gpus else 'CPU'}, log {log_file}", flush=True)
    keeper = Keeper(starters, _address(host, "127.0.0.1"), rollout, token=token)
    try:
        keeper.watch(stop)
    finally:
        keeper.end()
    print("servers ended", flush=True)


def divide_gpus(gpus: Sequence[str], servers: int | None, tensor: int) -> list[tuple[str, ...]]:
    """What each server gets: `tensor` GPUs in order, or none at all where there are none.

    Raises:
        ConfigError: there are too few GPUs.
    """
    if servers is not None and servers < 1:
        raise ConfigError(f"--servers {servers} must be at least 1")
    if not gpus:
        return [()] * (servers or 1)
    if servers is None and tensor > len(gpus):
        raise ConfigError(f"rollout.tensor {tensor} exceeds the {len(gpus)} GPUs of this machine; lower it")
    servers = servers or len(gpus) // tensor
    if servers * tensor > len(gpus):
        raise ConfigError(
            f"--servers {servers} x rollout.tensor {tensor} need {servers * tensor} GPUs, this machine has {len(gpus)}; "
            "lower one of them"
        )
    return [tuple(gpus[k * tensor : (k + 1) * tensor]) for k in range(servers)]


def check_exposure(host: str) -> None:
    """
    Raises:
        ConfigError: others could reach the servers, and would not be asked for a token.
    """
    if server_token() is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from other machines, and whoever reaches a server can replace its weights; set "
            f"{TOKEN_VARIABLE}, here and for the trainer, to the same secret (e.g. of `openssl rand -hex 24`), or leave --host "
            "out for this machine alone"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there; False for any name but localhost."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, of whatever address
        return False


def check_ports(host: str, port: int, count: int) -> None:
    """
    Raises:
        ConfigError: one of the `count` ports from `port` on cannot be listened on.
    """
    if not 1 <= port <= LAST_PORT + 1 - count:
        raise ConfigError(f"--port {port}: {count} servers need ports within 1 to {LAST_PORT}")
    for number in range(port, port + count):
        try:
            family, _, _, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
            socket.create_server(address, family=family).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(f"--port: {number} is in use on this machine; choose another --port") from None
            raise ConfigError(
                f"--host {host} --port {number} cannot be listened on: {error.strerror}; choose another"
            ) from None


def _address(host: str, for_any: str) -> str:
    """`host` as a part of a URL; `for_any` where it stands for every interface."""
    if host in ANY_ADDRESS:
        return for_any
    return f"[{host}]" if ":" in host else host


def stop_on_signals() -> threading.Event:
    """Is set by SIGINT, and by SIGTERM unless that was ignored before."""
    stop = threading.Event()
    ignored = signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    # a handler even where it is ignored: the servers would inherit that, and they are ended by SIGTERM
    signal.signal(signal.SIGTERM, lambda *_: None if ignored else stop.set())
    return stop
