"""`server` mode: vLLM servers that all replicas share, over HTTP; the first replica's leader feeds them weights.

Prompts go to whichever server has room. A server that fails is left out until the next weight sync, which restarts it. One
that was started again by somebody else has failed too: every answer tells which weights it was sampled with, and only those
of the weights that were sent count.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np

from megatron_reheat.config import RolloutConfig
from megatron_reheat.errors import ConfigError, EngineDied, ReheatError, WeightSyncError
from megatron_reheat.rollout.checks import check_params, check_prompts
from megatron_reheat.rollout.rollout_engine import OnFinished, SyncReport
from megatron_reheat.rollout.server.client import ServerClient
from megatron_reheat.rollout.server.sender import Named
from megatron_reheat.rollout.server.servers import Servers
from megatron_reheat.rollout.server.weights import FRESH, ServerWeights, lost_weights, other_weights
from megatron_reheat.rollout.wire import SampleRequest
from megatron_reheat.types import Completion, SamplingParams

# sequences in flight for each that a server runs at a time, so that it never waits for the network
QUEUE_DEPTH = 2


class ServerFleet:
    """A `RolloutEngine` over vLLM servers.

    Every replica's leader holds one; only the one with `weights` updates and restarts servers. The others are told the
    version by `adopt`.

    Args:
        label: tells this run's weights from any other's; the same in every fleet of the run.
        num_clients: fleets that share the servers.
    """

    def __init__(
        self,
        servers: Servers,
        vocab_size: int,
        config: RolloutConfig,
        *,
        label: str,
        weights: ServerWeights | None,
        num_clients: int = 1,
    ) -> None:
        self._servers = servers
        self._vocab_size = vocab_size
        self._label = label
        self._weights = weights
        self._sequences_in_flight = QUEUE_DEPTH * config.max_num_seqs / num_clients
        self._policy_version: int | None = None

    @property
    def policy_version(self) -> int | None:
        """None while a server is known to have failed: it holds no weights."""
        return None if self._servers.dead else self._policy_version

    def adopt(self, version: int) -> None:
        """The leading fleet has given the servers the weights of `version`."""
        self._policy_version = version
        self._servers.dead.clear()

    def wait_ready(self) -> float:
        return self._servers.wait_ready()

    def restart(self) -> None:
        if self._weights is None:
            return
        self._policy_version = None
        self._weights.disconnect()
        self._servers.restart()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        n: int,
        seed: int,
        on_finished: OnFinished | None = None,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`. What is sampled depends on the seed, not on the server a prompt goes to."""
        self.wait_ready()
        version = self._policy_version
        if not prompts:
            return []
        if version is None:
            raise WeightSyncError("the servers hold no complete weights; sync weights before sampling")
        check_params(params, n, self._vocab_size)
        context = min(info.max_model_len for info in self._servers.info.values())
        checked = check_prompts(prompts, context, self._vocab_size)
        request = SampleRequest.pack(checked, params, n, seed, apart=on_finished is not None)
        label = self._weights_label(version)
        # through a queue, so that what is done with an answer is done in this thread and not in the network's
        arrived: SimpleQueue[tuple[int, dict[str, Any]] | None] = SimpleQueue()
        work = self._servers.network.start(self._generate_all(request, label, lambda *answer: arrived.put(answer)))
        work.add_done_callback(lambda _: arrived.put(None))
        sampled: dict[int, Completion] = {}
        try:
            while (answer := arrived.get()) is not None:
                of_one = _completions(answer[1], label, version, request.samples, params.temperature)
                for place, completion in enumerate(of_one, start=answer[0] * request.samples):
                    sampled[place] = completion
                    if on_finished is not None:
                        on_finished(*divmod(place, n), completion)
        finally:
            work.cancel()  # of work that is done, nothing
        work.result()
        return [[sampled[p * n + i] for i in range(n)] for p in range(len(prompts))]

    def update_weights(self, tensors: Iterable[Named], version: int, verify: bool) -> SyncReport:
        assert self._weights is not None
        self._policy_version = None
        tensors = iter(tensors)
        started = time.monotonic()
        try:
            self.wait_ready()
            for error in self._servers.dead.values():
                raise error
            sent = self._weights.update(tensors, self._weights_label(version), verify)
        except (ReheatError, RuntimeError) as error:
            for _ in tensors:  # other ranks are inside the same collectives
                pass
            failure = self._update_failure(error)
            self._weights.disconnect()
            raise failure from None
        self._policy_version = version
        num_tensors, num_bytes, verified = sent
        return SyncReport(version, num_tensors, num_bytes, time.monotonic() - started, verified)

    def sleep(self) -> None:
        """Servers have devices of their own: there is nothing to give back."""

    def wake(self) -> None: ...

    def close(self) -> None:
        self._policy_version = None
        if self._weights is not None:
            self._weights.disconnect()  # servers that others started stay, and take the next run's
        self._servers.close()

    def _weights_label(self, version: int) -> str:
        return f"{self._label}-{version}"

    def _update_failure(self, error: Exception) -> ReheatError:
        """A server that is gone can be replaced; what a living one says of the weights is for the user."""
        if isinstance(error, ConfigError | WeightSyncError):
            return error
        if isinstance(error, EngineDied) or not isinstance(error, ReheatError):
            self._servers.find_dead()
        for death in self._servers.dead.values():
            return death
        return WeightSyncError(str(error))

    async def _generate_all(
        self, request: SampleRequest, label: str, take: Callable[[int, dict[str, Any]], None]
    ) -> None:
        """Calls `take` with the number of each body and the answer to it. Bodies of a server that fails, or has lost the
        weights `label`, go to the others."""
        bodies = _bodies(request)
        waiting = deque(range(len(bodies)))
        dead = self._servers.dead

        async def work(client: ServerClient) -> None:
            while waiting and client.url not in dead:
                index = waiting.popleft()
                try:
                    answer = await client.post("inference/v1/generate", bodies[index])
                    if self._has_lost(answer, label):
                        raise lost_weights(client)
                    take(index, answer)
                except EngineDied as error:
                    waiting.appendleft(index)
                    dead[client.url] = error

        wanted = int(self._sequences_in_flight / request.samples)
        while waiting:
            alive = self._servers.alive
            if not alive:
                raise EngineDied("; ".join(map(str, dead.values())))
            slots = max(1, min(wanted, self._servers.network.most_requests // len(alive)))
            per_server = min(slots, -(-len(waiting) // len(alive)))
            # in turns, so that a few prompts spread over all servers
            await asyncio.gather(*(work(client) for _ in range(per_server) for client in alive))

    def _has_lost(self, answer: dict[str, Any], label: str) -> bool:
        """Whether the server that answered must be sent its weights again: those of another run are not ours to replace."""
        labels = set().union(*map(_labels, answer["choices"]))
        ours = [held == FRESH or held.startswith(f"{self._label}-") for held in labels]
        return labels != {label} and bool(ours) and all(ours)


def new_label() -> str:
    """12 random hexadecimal digits."""
    return uuid.uuid4().hex[:12]


def _bodies(request: SampleRequest) -> list[dict[str, Any]]:
    return [
        {
            "token_ids": prompt,
            "sampling_params": {
                "n": request.samples,
                "seed": request.seed_of(place),
                "temperature": request.temperature,
                "top_p": request.top_p,
                "max_tokens": request.max_tokens,
                "stop_token_ids": list(request.stop_token_ids),
                "ignore_eos": True,  # stop_token_ids alone decides
                "logprobs": 0,
                "detokenize": False,
            },
        }
        for index, prompt in enumerate(request.prompts())
        for place in range(index * request.n, (index + 1) * request.n, request.samples)
    ]


def _labels(choice: dict[str, Any]) -> set[str]:
    """Of the weights that sampled it: vLLM's engine labels every token."""
    return {span["version"] for span in choice.get("weight_versions") or ()}


def _completions(answer: dict[str, Any], label: str, version: int, n: int, temperature: float) -> list[Completion]:
    """
    Raises:
        WeightSyncError: some tokens were sampled by other weights than `label`'s.
    """
    completions = []
    for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
        tokens, logprobs = choice["token_ids"], choice["logprobs"]["content"]
        labels = _labels(choice)
        if labels != {label}:
            raise other_weights(sorted(labels), label)
        if choice["finish_reason"] not in ("stop", "length") or len(logprobs) != len(tokens):
            raise ReheatError(f"vLLM ended a request with finish_reason {choice['finish_reason']!r}")
        completions.append(
            Completion(
                np.asarray(tokens, dtype=np.int32),
                np.asarray([item["logprob"] for item in logprobs], dtype=np.float32),
                temperature,
                version,
                choice["finish_reason"],
            )
        )
    if len(completions) != n:
        raise ReheatError(f"vLLM returned {len(completions)} samples of a prompt instead of {n}")
    return completions
