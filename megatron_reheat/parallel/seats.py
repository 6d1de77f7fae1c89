"""Which ranks hold a vLLM engine, and how what they sample reaches everybody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_reheat.config import RolloutConfig
from megatron_reheat.errors import ConfigError
from megatron_reheat.parallel.topology import Topology


@dataclass(frozen=True)
class Seats:
    """This rank's place among the `count` engines: it works for number `index`, and holds it if `is_leader`.

    `share(mine, error)` all-gathers one object per engine to every rank, in order; see `Topology.share_from_leaders`.
    """

    index: int
    count: int
    is_leader: bool
    share: Callable[[Any, str | None], list[Any]]


def engine_seats(topology: Topology, rollout: RolloutConfig) -> Seats:
    """One engine per replica, held by its first rank; colocated, one on every `rollout.tensor` consecutive ranks.

    Each context rank's copy of the model is a replica, and has an engine of its own: sampling does not split sequences.

    Raises:
        ConfigError: a node's ranks cannot be divided so.
    """
    if rollout.mode != "colocated":
        rank, count = topology.replica_rank, topology.num_replicas
        return Seats(rank, count, topology.is_replica_leader, topology.share_from_leaders)
    size = rollout.tensor
    if topology.local_world_size % size:
        raise ConfigError(
            f"rollout.tensor {size} does not divide the {topology.local_world_size} ranks of a node, which "
            "rollout.mode=colocated needs; change rollout.tensor"
        )

    def share(mine: Any, error: str | None = None) -> list[Any]:
        return topology.share_from_all(mine, error)[::size]

    return Seats(topology.rank // size, topology.world_size // size, topology.rank % size == 0, share)
