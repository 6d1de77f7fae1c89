"""Trainer -> engine weight transfer, and the check that both still agree on what was sampled."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import numpy as np
import torch

from megatron_reheat.config import RolloutConfig
from megatron_reheat.errors import WeightSyncError
from megatron_reheat.rollout.rollout_engine import RolloutEngine, SyncReport
from megatron_reheat.types import FloatArray


class WeightSync:
    """Pushes policies to an engine. Ranks without one pass None: they only take part in producing the tensors."""

    def __init__(self, engine: RolloutEngine | None, config: RolloutConfig) -> None:
        self._engine = engine
        self._verify_every = config.verify_every
        self._pushes = 0

    def push(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> SyncReport:
        """Gives the engine the weights of policy `version`; digests are compared on the first and every N-th push.

        A push after a failed one is verified too. `tensors` is consumed to its end on every rank.

        Raises:
            WeightSyncError: naming the tensors that are wrong, missing or changed on the way.
            EngineDied: when the engine ended or did not answer.
        """
        if self._engine is None:
            return _drain(tensors, version)
        due = self._pushes % self._verify_every == 0 if self._verify_every else self._pushes == 0
        after_failure = self._engine.policy_version is None
        verify = due or after_failure
        self._pushes += 1
        report = self._engine.update_weights(tensors, version, verify)
        held = self._engine.policy_version
        if report.version != version or held != version:
            raise WeightSyncError(f"the engine reports policy version {held} after it was sent {version}")
        return report


def mismatch(rollout_logprobs: FloatArray, old_logprobs: FloatArray) -> dict[str, float]:
    """How far engine and trainer disagree on N sampled tokens; both arrays are [N] fp32.

    `mismatch_kl` estimates KL(engine || trainer) in nats per token, without bias as the engine drew the tokens, by the mean
    of exp(r) - 1 - r, which is never negative, with r = old_logprobs - rollout_logprobs. The engine's policy is the one that
    sampled: under `rollout.overlap` it is a step behind the trainer's. `mismatch_abs_mean` and `mismatch_abs_max` are of |r|.
    """
    assert rollout_logprobs.shape == old_logprobs.shape
    if rollout_logprobs.size == 0:
        return {"mismatch_kl": 0.0, "mismatch_abs_mean": 0.0, "mismatch_abs_max": 0.0}
    r = old_logprobs.astype(np.float64) - rollout_logprobs.astype(np.float64)
    with np.errstate(over="ignore"):
        kl = float(np.mean(np.expm1(r) - r))
    return {"mismatch_kl": kl, "mismatch_abs_mean": float(np.abs(r).mean()), "mismatch_abs_max": float(np.abs(r).max())}


def check_mismatch(value: float, limit: float, policy_version: int) -> None:
    """Stops training on samples the trainer does not recognise as its own.

    Raises:
        WeightSyncError: when `mismatch_kl` is above `rollout.mismatch_limit` or not finite.
    """
    if not math.isfinite(value) or value > limit:
        raise WeightSyncError(
            f"mismatch_kl {value:.4g} of policy version {policy_version} is above rollout.mismatch_limit {limit:g}: "
            "the engine does not sample from the trainer's policy; compare rollout.dtype with model.dtype, or set "
            "rollout.verify_every=1 to have every weight sync checked"
        )


def _drain(tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> SyncReport:
    started = time.perf_counter()
    num_tensors = num_bytes = 0
    for _, tensor in tensors:
        num_tensors += 1
        num_bytes += tensor.nbytes
        del tensor  # what comes behind the last one counts on its memory
    return SyncReport(version, num_tensors, num_bytes, time.perf_counter() - started, verified=False)
