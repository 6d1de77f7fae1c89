"""The reference policy: the weights with which this run's RL begins, frozen, scored by the trainer in its own place.

After a warm start or a fork they are nowhere else, so they are kept as `reference/` in the run folder, which any layout reads.
Where RL begins from the model's own folder, they are read from there again. The digest in every checkpoint tells that what is
read later are the same weights, to the bit.
"""

from __future__ import annotations

import shutil
from functools import reduce
from operator import xor
from pathlib import Path

from megatron_reheat.errors import ReheatError
from megatron_reheat.model.engine import Engine
from megatron_reheat.model.frozen_weights import FrozenWeights
from megatron_reheat.model.policy_export import export_policy
from megatron_reheat.rollout.packed import digest
from megatron_reheat.types import Scores, TrainBatch


class Reference:
    """Nothing until `begin` or `resume`. Every method is a collective over all ranks.

    Args:
        kept: where the weights are kept that are in no other folder.
        hf_folder: the model's own.
    """

    def __init__(self, engine: Engine, kept: Path, hf_folder: Path, stop_token_ids: tuple[int, ...]) -> None:
        self._engine, self._kept, self._hf_folder, self._stop_token_ids = engine, kept, hf_folder, stop_token_ids
        self._weights: FrozenWeights | None = None
        self.digest: str | None = None

    def begin(self, *, keep: bool) -> None:
        """RL begins: the reference is the policy of now. `keep` it, unless these are the weights of the model's folder.

        Raises:
            ReheatError: it cannot be written.
        """
        topology = self._engine.topology
        if topology.is_main:  # an earlier run's, or that of a start that was killed before it was saved
            shutil.rmtree(self._kept, ignore_errors=True)
        if keep:
            export_policy(self._engine, self._kept, self._hf_folder, self._stop_token_ids)
            topology.barrier()
        self._weights = FrozenWeights(self._engine.module, topology)
        self.digest = self._digest()

    def resume(self, digest: str | None) -> None:
        """RL goes on: reads the reference with which it began, whose digest the checkpoint has.

        Raises:
            ReheatError: it is not there any more, or its weights are others.
        """
        engine, topology = self._engine, self._engine.topology
        if digest is None:
            raise self._failure("this run's RL began without a reference policy, and its first weights were not kept")
        folder = self._kept if topology.any(topology.is_main and self._kept.is_dir()) else self._hf_folder
        self._weights = FrozenWeights.of_folder(folder, engine.module, topology)
        with self._weights.in_place():
            self.digest = self._digest()
        if self.digest != digest:
            raise self._failure(f"{folder} does not hold the weights with which this run's RL began")

    def score(self, batch: TrainBatch, *, temperature: float) -> Scores:
        """Log-probabilities and entropies of the reference, as `Engine.score`; the policy's weights are as before."""
        assert self._weights is not None
        with self._weights.in_place():
            return self._engine.score(batch, temperature=temperature)

    def _failure(self, problem: str) -> ReheatError:
        failure = ReheatError(
            f"{problem}; the reference policy (rl.kl_coef, or rl.method's) needs them: set what asks for it back to what it "
            "was, bring the weights back, or start a run that forks from this one (run.fork_from), whose reference is then "
            "the policy of now"
        )
        failure.on_every_rank = True
        return failure

    def _digest(self) -> str:
        """Of the model's weights, the same under every layout."""
        topology, value = self._engine.topology, 0
        stream = self._engine.iter_hf_weights()
        if topology.is_main:
            value = reduce(xor, (digest(name, tensor) for name, tensor in stream))
        else:
            for _ in stream:
                pass
        return f"{topology.share_from_leaders(value)[0]:016x}"
