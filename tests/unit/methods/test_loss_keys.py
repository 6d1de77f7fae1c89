"""What `rl` adds to every loss is in that of every method, or refused by name when the recipe is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_reheat.errors import ConfigError
from megatron_reheat.losses.policy_gradient import REF_LOGPROBS
from megatron_reheat.losses.reference_kl import reference_kl
from megatron_reheat.losses.sdpg import HINTED
from megatron_reheat.losses.surrogates import SELECTED
from megatron_reheat.methods import METHODS, choose_method
from megatron_reheat.methods.grpo import GRPO
from megatron_reheat.parallel.packing import MicroBatch, make_microbatches
from megatron_reheat.parallel.vocab import VocabLogits
from megatron_reheat.recipe import parse_config
from tests.unit.methods.batches import AT, TEMPERATURE, VOCAB, make_case
from tests.unit.methods.builders import make_any

KL_COEF = 0.3


def logits(seed: int, rows: int) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def micro_batch(aggregation: Any) -> MicroBatch:
    """With every column that a loss may ask for."""
    case, generator = make_case(), np.random.default_rng(1)
    batch = case.batch.with_old_logprobs(case.scores.logprobs)
    lengths = [s.num_response_tokens for s in batch.sequences]
    batch = batch.with_extra(HINTED, [np.ones(n, np.float32) for n in lengths])
    batch = batch.with_extra(SELECTED, [(np.arange(n) == 1).astype(np.float32) for n in lengths])
    batch = batch.with_extra(REF_LOGPROBS, [generator.normal(-3, 0.5, n).astype(np.float32) for n in lengths])
    options = {"data_rank": 0, "data_size": 1, "microbatch_tokens": 1000, "alignment": 1}
    (micro,) = make_microbatches(batch, aggregation=aggregation, **options)
    others = {
        name: VocabLogits(logits(seed, len(micro.tokens)), VOCAB) for seed, name in ((5, "teacher"), (6, "layer1"))
    }
    return replace(micro, readings=others)


def gradient(method: GRPO, micro: MicroBatch) -> Tensor:
    z = logits(4, len(micro.tokens)).requires_grad_()
    loss, _ = method.loss(AT)(VocabLogits(z, VOCAB), micro)
    loss.backward()
    assert z.grad is not None
    return z.grad


@pytest.mark.parametrize("name", METHODS)
def test_the_kl_to_the_reference_is_in_every_methods_loss_or_refused(name: str) -> None:
    keys = {"kl_coef": KL_COEF, "kl_estimator": "k2"}
    plain = make_any(name)
    micro = micro_batch(plain.config.rl.aggregation)
    try:
        held = make_any(name, **keys)
    except ConfigError as refusal:
        assert "rl.kl_coef" in str(refusal)
        return
    assert held.needs_reference(held.config, held.options)
    z = logits(4, len(micro.tokens)).requires_grad_()
    logprobs, _ = VocabLogits(z, VOCAB).logprobs(micro.targets, temperature=TEMPERATURE)
    kl = reference_kl(logprobs, micro.extra[REF_LOGPROBS], "k2")
    (KL_COEF * kl * micro.loss_weights).sum().backward()
    assert z.grad is not None and z.grad.norm() > 0.01
    torch.testing.assert_close(gradient(held, micro) - gradient(plain, micro), z.grad, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("key", ["overlap", "max_staleness"])
@pytest.mark.parametrize("name", METHODS)
def test_what_corrects_for_a_policy_of_a_step_before_is_told_in_one_go(name: str, key: str) -> None:
    """Or that nothing does: a key that a refusal asks for is not refused in its turn."""

    def told(tis_cap: float | None) -> str:
        try:
            if key == "overlap":
                make_any(name, {"mode": "server", "overlap": True}, tis_cap=tis_cap)
            else:
                make_any(name, max_staleness=1, dynamic_sampling=True, tis_cap=tis_cap)
        except ConfigError as refusal:
            return str(refusal)
        return ""

    without, corrected = told(None), told(2.0)
    if name == "dppo":
        assert without == "" and corrected.endswith("leave rl.tis_cap empty")
    elif key == "max_staleness" and name == "avspo":
        assert without == corrected and without.endswith("set rl.dynamic_sampling=false")
    elif key == "max_staleness" and name in ("oger", "s2l_po"):
        assert without == corrected and without.endswith("in the step that samples them; set rl.max_staleness=0")
    elif name == "opefo":
        remedy = (
            "samples a step ahead; set it to false" if key == "overlap" else "what an older one sampled; set it to 0"
        )
        assert without == corrected and remedy in without
    else:
        assert corrected == "" and without.endswith("set rl.tis_cap (e.g. 2.0) to correct for it")


OWN = """
from megatron_reheat.methods.grpo import GRPO
from megatron_reheat.methods.oisd import OISD

class Own(GRPO):
    def loss(self, at):
        return None

class Telling(Own):
    loss_keys = ("kl_coef",)

class Again(OISD):
    def loss(self, at):
        return None
"""


@pytest.mark.parametrize("key", ["tis_cap", "entropy_coef", "kl_coef"])
def test_a_loss_of_the_users_own_follows_what_it_names(tmp_path: Path, key: str) -> None:
    path = tmp_path.resolve() / "own.py"
    path.write_text(OWN)

    def choose(name: str) -> None:
        tree = {"model": {"hf_path": "-"}, "data": {"path": "-"}, "rl": {"method": f"{path}:{name}", key: 1.5}}
        choose_method(parse_config(tree))

    for name in ("Own", "Again"):
        with pytest.raises(ConfigError) as caught:
            choose(name)
        assert str(caught.value) == (
            f"rl.{key}: rl.method {path}:{name} has a loss of its own, which does not follow it; leave it out"
        )
    if key == "kl_coef":
        choose("Telling")


def test_a_loss_of_the_users_own_that_corrects_for_nothing_does_not_sample_ahead(tmp_path: Path) -> None:
    path = tmp_path.resolve() / "own.py"
    path.write_text(OWN)
    with pytest.raises(
        ConfigError, match=r"for which the loss of rl\.method .*:Own does not correct; set rollout\.overlap="
    ):
        make_any(f"{path}:Own", {"mode": "server", "overlap": True})
