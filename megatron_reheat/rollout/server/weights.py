"""One in-place weight update of every vLLM server at once; the trainer gathers a bucket while they load the one before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from urllib.parse import urlsplit

from megatron_reheat.config import RolloutConfig
from megatron_reheat.errors import ConfigError, EngineDied, EngineStuck, ReheatError, WeightSyncError
from megatron_reheat.rollout.server.client import ServerClient
from megatron_reheat.rollout.server.sender import GlooSender, Named, NcclSender, WeightSender, address_towards
from megatron_reheat.rollout.server.servers import Servers

NO_UPDATE = "start_weight_update must be called"  # in what vLLM answers to weights outside an update
# for members to meet, and for one bucket; vLLM's NCCL group has the same
GROUP_TIMEOUT_S = 300.0
UNFINISHED = "unfinished"  # weight label of a server between the start of an update and its end
FRESH = "default"  # vLLM's own, of a server that was sent nothing since it started


class ServerWeights:
    """Holds the group of this process and all workers, from the first update until something fails."""

    def __init__(self, servers: Servers, config: RolloutConfig, on_cpu: bool) -> None:
        self._servers = servers
        self._config = config
        self._on_cpu = on_cpu
        self._sender: WeightSender | None = None
        self._updating = False
        self._label: str | None = None

    def update(self, tensors: Iterator[Named], label: str, verify: bool) -> tuple[int, int, bool]:
        """Returns the numbers of tensors and bytes sent, and whether digests were compared.

        Raises:
            EngineDied: a server failed, or lost its weights; `servers.dead` says which are of no use.
            WeightSyncError: another run has given one its own.
            RuntimeError: the transfer itself failed.
        """
        if self._sender is not None:
            self._check_members()
        sender, post = self._connect(), self._servers.post
        verify = verify and sender.can_verify
        post("update_weight_version", {"new_version": UNFINISHED}).result()
        post("pause?mode=wait").result()
        self._updating = True
        post("start_weight_update").result()
        num_tensors = num_bytes = 0
        loaded: Future[None] | None = None
        for bucket in _buckets(tensors, self._config.sync_bucket_mb << 20):
            info, packed = sender.pack(bucket, verify)
            if loaded is not None:
                loaded.result()
            loaded = post("update_weights", {"update_info": info}, fail_fast=True)
            _take_part(partial(sender.send, packed, partial(_has_failed, loaded)), loaded)
            num_tensors += len(bucket)
            num_bytes += sum(t.nbytes for _, t in bucket)
        if loaded is not None:
            loaded.result()
        if sender.last_info is not None:
            post("update_weights", {"update_info": sender.last_info}).result()
        post("finish_weight_update", {"weight_version": label}).result()
        self._updating = False
        self._label = label
        post("reset_prefix_cache").result()
        post("resume").result()
        return num_tensors, num_bytes, verify

    def disconnect(self) -> None:
        """Gives the group and an update under way up, here and on the servers that live.

        The next update makes a new group. Servers that cannot take one are put down as dead.
        """
        sender, self._sender = self._sender, None
        updating, self._updating = self._updating, False
        if sender is None:
            return
        sender.close()
        run, dead = self._servers.network.run, self._servers.dead
        for client in self._servers.alive:
            if updating and not sender.can_retry:
                dead[client.url] = EngineStuck(f"vLLM server {client.url} was left with half of its weights replaced")
                continue
            try:
                if updating:
                    # vLLM has no way to give an update up but one that fails
                    with contextlib.suppress(ReheatError):
                        run(client.post("update_weights", {"update_info": {"given_up": True}}))
                run(client.post("shutdown_weight_transfer_engine"))
            except ReheatError as error:
                dead[client.url] = EngineStuck(f"{error}; it has to be started again")

    def _check_members(self) -> None:
        """A server that was started again since the last update has left the group.

        Raises:
            EngineDied: some have.
            WeightSyncError: another run has given one its own weights.
        """
        for client in self._servers.alive:
            held = self._servers.network.run(client.weights_label())
            if held == FRESH:
                self._servers.dead[client.url] = lost_weights(client)
            elif held != self._label:
                raise other_weights([held], self._label)
        for death in self._servers.dead.values():
            raise death

    def _clear_servers(self, sender: WeightSender) -> None:
        """Takes back what a trainer that ended without a word left on servers that are not ours.

        Raises:
            EngineStuck: a server does not answer, or was left in the middle of an update and cannot take another.
            ConfigError: so was one that cannot be told to end.
        """
        for client in self._servers.alive:
            try:
                self._servers.network.run(client.post("update_weights", {"update_info": {"given_up": True}}))
            except EngineStuck as error:
                self._servers.dead[client.url] = error
                continue
            except ReheatError as error:
                if NO_UPDATE not in str(error) and not sender.can_retry:
                    left = f"{client.url} was left in the middle of a weight update"
                    if self._servers.info[client.url].shape is None:  # not a server of `reheat`
                        raise ConfigError(f"{self._servers.key}: {left}; start it again") from None
                    self._servers.dead[client.url] = EngineStuck(left)
            with contextlib.suppress(ReheatError):
                self._servers.network.run(client.post("shutdown_weight_transfer_engine"))
        for death in self._servers.dead.values():
            raise death

    def _connect(self) -> WeightSender:
        if self._sender is not None:
            return self._sender
        info = self._servers.info
        addresses = [address_towards(urlsplit(url).hostname or "", self._servers.key) for url in info]
        # where any server is on another machine, that machine's view of us is the one that all can use
        address = next((a for a in addresses if not a.startswith("127.")), addresses[0])
        offsets, next_offset = {}, 1
        for url, server in info.items():
            offsets[url] = next_offset
            next_offset += server.num_workers
        num_workers = next_offset - 1
        sender: WeightSender = (
            GlooSender(address, num_workers, min(self._config.timeout_s, GROUP_TIMEOUT_S))
            if self._on_cpu
            else NcclSender(address, num_workers)
        )
        self._clear_servers(sender)
        joined = self._servers.post(
            "init_weight_transfer_engine", lambda url: {"init_info": sender.init_info(offsets[url])}, fail_fast=True
        )
        self._sender = sender
        _take_part(sender.join, joined)
        joined.result()
        return sender


def lost_weights(client: ServerClient) -> EngineDied:
    """For a server that has to be sent this run's weights again."""
    return EngineDied(f"vLLM server {client.url} was started again and has lost its weights")


def other_weights(labels: Sequence[str], expected: str | None) -> WeightSyncError:
    """For servers with the weights `labels`, which are not ours to replace."""
    return WeightSyncError(
        f"a server holds weights {sorted(labels)} instead of {expected}: another run, or somebody, changed them; give every "
        "run servers of its own"
    )


def _has_failed(answer: Future[None]) -> bool:
    return answer.done() and answer.exception() is not None


def _take_part(ours: Callable[[], None], theirs: Future[None]) -> None:
    """Takes our part in a collective while the servers take theirs; their failure explains ours."""
    try:
        ours()
    except RuntimeError:
        theirs.result()
        raise


def _buckets(tensors: Iterator[Named], capacity: int) -> Iterator[list[Named]]:
    bucket: list[Named] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > capacity:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket
