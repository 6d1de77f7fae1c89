"""The KL to a reference policy: values and gradients against exact expectations over a small vocabulary, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_reheat.config import RLConfig
from megatron_reheat.losses.policy_gradient import REF_LOGPROBS, policy_loss
from megatron_reheat.losses.reference_kl import reference_kl
from megatron_reheat.parallel.packing import make_microbatches
from megatron_reheat.parallel.vocab import VocabLogits
from megatron_reheat.types import TrainBatch, TrainSequence

POLICY = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
REF = torch.tensor([0.2, 0.3, 0.1, 0.4], dtype=torch.float64)


def _expected(estimator: str) -> tuple[float, torch.Tensor]:
    """E over the policy's samples of the estimator, and of its gradient with respect to the policy's logits."""
    z = POLICY.log().requires_grad_()
    values = reference_kl(z.log_softmax(-1), REF.log(), estimator)
    (values * POLICY).sum().backward()
    return (values.detach() * POLICY).sum().item(), z.grad


def _kl_gradient(first: str) -> torch.Tensor:
    z = POLICY.log().requires_grad_()
    q = z.softmax(-1)
    kl = (q * (q.log() - REF.log())).sum() if first == "policy" else (REF * (REF.log() - q.log())).sum()
    kl.backward()
    return z.grad


KL = float((POLICY * (POLICY / REF).log()).sum())


@pytest.mark.parametrize("estimator", ["k1", "k3", "k1+", "k3+"])
def test_the_value_is_the_kl_in_the_mean(estimator):
    assert _expected(estimator)[0] == pytest.approx(KL, rel=1e-12)


@pytest.mark.parametrize("estimator", ["k2", "k1+", "k3+"])
def test_the_gradient_is_that_of_the_kl(estimator):
    torch.testing.assert_close(_expected(estimator)[1], _kl_gradient("policy"), rtol=1e-12, atol=1e-12)


def test_k1_pulls_nowhere_and_k3_towards_the_other_kl():
    torch.testing.assert_close(_expected("k1")[1], torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(_expected("k3")[1], _kl_gradient("reference"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k1+", "k3+"])
@pytest.mark.parametrize("gap", [-30.0, 30.0, 0.0])
def test_far_tokens_stay_finite_and_equal_ones_cost_nothing(estimator, gap):
    logprobs = torch.tensor([-40.0], requires_grad=True)
    value = reference_kl(logprobs, torch.tensor([-40.0 + gap]), estimator)
    value.sum().backward()
    assert value.isfinite().all() and logprobs.grad.isfinite().all()
    if gap == 0:
        assert value.item() == 0
    if estimator == "k3" and gap:  # verl's bound
        assert value.item() == 10.0 and logprobs.grad.item() == 0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k1+", "k3+"])
def test_the_loss_of_a_batch_has_it_on_top(estimator):
    generator = np.random.default_rng(0)

    def draw(n: int) -> np.ndarray:
        return generator.normal(-3, 0.5, n).astype(np.float32)

    batch = TrainBatch(
        tuple(
            TrainSequence(
                generator.integers(0, 30, 4 + i).astype(np.int32), 2, float(generator.normal()), draw(2 + i), draw(2 + i),
                extra={REF_LOGPROBS: draw(2 + i)},
            )
            for i in range(4)
        )
    )  # fmt: skip
    (micro,) = make_microbatches(batch, data_rank=0, data_size=1, microbatch_tokens=100, alignment=8)
    logits = torch.randn(len(micro.tokens), 30, generator=torch.Generator().manual_seed(0))
    options = {
        "sampling_temperature": 0.8, "clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0, "tis_cap": 1.1, "entropy_coef": 0.0,
    }  # fmt: skip

    def run(**more):
        z = logits.clone().requires_grad_()
        loss, metrics = policy_loss(VocabLogits(z, 30), micro, **options, **more)
        loss.backward()
        return loss.item(), z.grad.double(), metrics.reduced()

    plain, with_kl = run(), run(kl_coef=0.3, kl_estimator=estimator)

    z = logits.double().requires_grad_()
    mask = micro.loss_mask.bool()
    d = (z / 0.8).log_softmax(-1).gather(1, micro.targets[:, None])[mask, 0] - micro.extra[REF_LOGPROBS][mask].double()
    k3 = ((-d).exp() - 1 + d).clamp_max(10.0)
    k2 = d.square() / 2
    value = {"k1": d, "k2": k2, "k3": k3, "k1+": d, "k3+": k3}[estimator].mean()
    {"k1": d, "k2": k2, "k3": k3, "k1+": k2, "k3+": k2}[estimator].mean().backward()
    assert with_kl[0] - plain[0] == pytest.approx(0.3 * value.item(), rel=1e-4)
    torch.testing.assert_close(with_kl[1] - plain[1], 0.3 * z.grad, rtol=1e-3, atol=1e-6)

    gap = micro.extra[REF_LOGPROBS].double()[mask] - micro.old_logprobs.double()[mask]
    weights = (micro.old_logprobs - micro.rollout_logprobs)[mask].double().exp()
    expected = (gap.exp() - 1 - gap).mul(weights).mean().item()
    assert with_kl[2]["policy/kl_to_ref"] == pytest.approx(expected, rel=1e-5)
    assert {**with_kl[2], "policy/loss": None} == {
        **plain[2], "policy/loss": None, "policy/kl_to_ref": with_kl[2]["policy/kl_to_ref"],
    }  # fmt: skip


def test_the_recipes_default_has_no_reference():
    assert RLConfig().kl_coef == 0
    with pytest.raises(ValueError, match="k4"):
        RLConfig(kl_estimator="k4")
