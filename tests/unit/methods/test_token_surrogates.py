"""CISPO, SAPO and DPPO against their formulas per token, written out in float64; every region of each is met."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_reheat.errors import ConfigError
from megatron_reheat.losses.surrogates import binary_kl
from tests.unit.methods.batches import check, columns, make_case, make_method, run


def token_mean(terms: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(terms).mean()


def test_cispo_weighs_reinforce_by_the_clipped_ratio_and_drops_no_token():
    case = make_case(spread=0.6)
    loss, gradient, metrics, _ = run(make_method("cispo", {"eps_low": 0.3, "eps_high": 0.5}), case)
    dense, rows = case.logprobs()
    terms, ratios = [], []
    for row, (old, _, advantage) in zip(rows, columns(case), strict=True):
        ratio = (row.detach() - old).exp()
        ratios += ratio.tolist()
        terms.append(-ratio.clamp(0.7, 1.5) * advantage * row)
    check(loss, gradient, token_mean(terms), dense)
    outside = np.mean([not 0.7 <= r <= 1.5 for r in ratios])
    assert 0.2 < outside < 0.8 and metrics["cispo/weight_clipped_fraction"] == pytest.approx(outside)
    assert metrics["cispo/weight"] == pytest.approx(np.clip(ratios, 0.7, 1.5).mean(), rel=1e-5)


def test_cispos_defaults_bound_the_weight_by_0_and_5():
    far = make_case(spread=4.0)
    metrics = run(make_method("cispo"), far)[2]
    ratios = np.concatenate(
        [(r.detach() - o).exp().numpy() for r, (o, *_) in zip(far.logprobs()[1], columns(far), strict=True)]
    )
    assert metrics["cispo/weight"] == pytest.approx(ratios.clip(0, 5).mean(), rel=1e-4)
    assert metrics["cispo/weight_clipped_fraction"] == pytest.approx((ratios > 5).mean())


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_sapo_gates_softly_and_negative_tokens_sooner(aggregation):
    case = make_case(spread=0.8)
    loss, gradient, metrics, _ = run(make_method("sapo", {"tau_negative": 2.5}, aggregation=aggregation), case)
    dense, rows = case.logprobs()
    terms, slopes = [], []
    for row, (old, _, advantage) in zip(rows, columns(case), strict=True):
        ratio, tau = (row - old).exp(), 1.0 if advantage > 0 else 2.5
        gate = 1 / (1 + torch.exp(-tau * (ratio - 1)))
        slopes.append(4 * (gate * (1 - gate)).detach())
        terms.append(-4 / tau * gate * advantage)
    expected = token_mean(terms) if aggregation == "token_mean" else torch.stack([t.mean() for t in terms]).mean()
    check(loss, gradient, expected, dense)
    assert metrics["sapo/gate"] == pytest.approx(torch.cat(slopes).mean().item(), rel=1e-5)


def test_on_policy_sapo_is_the_policy_gradient():
    case = make_case(spread=0.0)
    _, gradient, *_ = run(make_method("sapo"), case)
    dense, rows = case.logprobs()
    token_mean([-a * row for row, (*_, a) in zip(rows, columns(case), strict=True)]).backward()
    torch.testing.assert_close(gradient, dense.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("divergence", "low", "high"), [("tv", 0.01, 0.02), ("kl", 0.002, 0.001), ("tv", None, None)])
def test_dppo_masks_what_leaves_the_sampler_too_far(divergence, low, high):
    case = make_case(spread=0.8)
    deltas = {"delta_low": low, "delta_high": high}
    loss, gradient, metrics, _ = run(make_method("dppo", {"divergence": divergence, **deltas}), case)
    dense, rows = case.logprobs()
    terms, masked = [], {True: 0, False: 0}
    for row, (_, mu, advantage) in zip(rows, columns(case), strict=True):
        p, m = row.detach().exp(), mu.exp()
        distance = (p - m).abs() if divergence == "tv" else m * (m / p).log() + (1 - m) * ((1 - m) / (1 - p)).log()
        limit = (high if advantage > 0 else low) or 0.15
        leaves = (distance > limit) & ((p - m) * advantage > 0)
        masked[advantage > 0] += int(leaves.sum())
        terms.append(torch.where(leaves, 0.0, -(row - mu).exp() * advantage))
    check(loss, gradient, token_mean(terms), dense)
    count = sum(map(len, terms))
    assert metrics["dppo/mask_high_fraction"] == pytest.approx(masked[True] / count)
    assert metrics["dppo/mask_low_fraction"] == pytest.approx(masked[False] / count)
    if low is not None:
        assert masked[True] and masked[False]


def test_the_kl_of_two_coins_is_exact_at_the_ends():
    p = torch.tensor([0.0, 0.3, 1.0, 1.0, 0.5], dtype=torch.float64)
    q = torch.tensor([0.5, 0.3, 0.5, 1.0, 1.0], dtype=torch.float64)
    value = binary_kl(p.clamp_min(1e-300).log(), q.log())
    torch.testing.assert_close(value[:4], torch.tensor([np.log(2), 0.0, np.log(2), 0.0], dtype=torch.float64))
    assert 100 < value[4] < 1e3  # infinite in truth, and far beyond any delta


def test_dppo_refuses_to_correct_for_the_sampler_twice():
    with pytest.raises(ConfigError, match=r"rl\.method dppo .* leave rl\.tis_cap empty"):
        make_method("dppo", tis_cap=2.0)


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("cispo", {"eps_low": 1.5}, r"rl\.options\.eps_low"),
        ("sapo", {"tau_positive": 0}, r"rl\.options\.tau_positive"),
        ("dppo", {"divergence": "js"}, r"rl\.options\.divergence"),
        ("dppo", {"delta": 0.1}, r"rl\.options\.delta: unknown key"),
    ],
)
def test_impossible_options_are_named(method, options, says):
    with pytest.raises(ConfigError, match=says):
        make_method(method, options)
