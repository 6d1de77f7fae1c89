"""Runs one after the other in one process, for comparisons of many short ones: engines and verifiers are started once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import replace
from typing import Self

from megatron_reheat.config import Config
from megatron_reheat.errors import ConfigError
from megatron_reheat.parallel import topology as parallel_topology
from megatron_reheat.run_lock import RunLock
from megatron_reheat.stages.engines import start_frozen
from megatron_reheat.stages.inputs import Inputs, agree_on_date, read_inputs
from megatron_reheat.stages.run import Helpers, Run

SHARED = ("parallel", "rollout", "reward")  # sections that are the same in all recipes of a series


class RunSeries:
    """A context manager; every method is a collective over all ranks. The policies may differ in their weights alone.

    The engines of frozen models (`rl.samplers`) are a run's own.
    """

    def __init__(self, config: Config) -> None:
        """
        Args:
            config: any recipe of the series.

        Raises:
            ConfigError: WORLD_SIZE does not fit its layout.
        """
        self._first = config
        self._topology = parallel_topology.initialize(config)
        self._open = ExitStack()
        self._helpers: Helpers | None = None
        self._max_model_len = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._open.close()
        if kind is None:  # a rank that failed must not wait for the others to leave the groups with it
            parallel_topology.finalize()

    def train(self, config: Config) -> bool:
        """As `stages.run.train`, but that the references of the data are not checked."""
        with self.run(config) as run:
            return run.go()

    @contextmanager
    def run(self, config: Config) -> Iterator[Run]:
        """A run that is ready to `go`. It cannot be used once another samples, which takes the engines over.

        Raises:
            ConfigError: the recipe is wrong, or needs other engines than the first.
        """
        for section in SHARED:
            if getattr(config, section) != getattr(self._first, section):
                raise ConfigError(
                    f"{section}: {config.run.name} differs from {self._first.run.name}, and runs in a series share their "
                    "layout, engines and verifiers; train it by itself"
                )
        inputs = agree_on_date(read_inputs(config), config, self._topology)
        with ExitStack() as own:
            if self._topology.is_main:
                own.enter_context(RunLock(config.run.path))
            helpers = copy(self._share(inputs))
            helpers.frozen = {name: start_frozen(name, config, self._topology, inputs) for name in inputs.frozen}
            for engine in helpers.frozen.values():
                if engine is not None:
                    own.callback(engine.close)
            yield Run(config, self._topology, inputs, helpers, None)

    def _share(self, inputs: Inputs) -> Helpers:
        if self._helpers is None:
            self._helpers = self._open.enter_context(Helpers(self._first, self._topology, replace(inputs, frozen={})))
            self._max_model_len = inputs.max_model_len
        if inputs.max_model_len > self._max_model_len:
            raise ConfigError(
                f"its sequences are of up to {inputs.max_model_len} tokens, and the engines of the series hold "
                f"{self._max_model_len}; set rollout.max_model_len={inputs.max_model_len} in all of them"
            )
        return self._helpers
