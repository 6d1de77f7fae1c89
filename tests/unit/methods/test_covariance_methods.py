"""Clip-Cov and KL-Cov: the selection over the whole batch, the losses in float64, and what makes no sense."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_reheat.errors import ConfigError
from megatron_reheat.types import Collected, Completion, Group, Prompt, Reward, Scores, TrainBatch
from tests.unit.methods.batches import AT, check, columns, make_case, make_method, run

SEVERAL = {"prompts_per_step": 4, "minibatch_prompts": 2}
NOTHING = Collected([], [], [], {})


def covariance_of(case) -> np.ndarray:
    logprobs = np.concatenate([o.numpy() for o, *_ in columns(case)])
    advantages = np.concatenate([np.full(len(o), a) for o, _, a in columns(case)])
    return (logprobs - logprobs.mean()) * (advantages - advantages.mean())


def selected_of(batch: TrainBatch) -> np.ndarray:
    return np.concatenate([s.extra["selected"] for s in batch.sequences]).astype(bool)


def split(values: np.ndarray, case) -> list[torch.Tensor]:
    lengths = [len(o) for o, *_ in columns(case)]
    return list(torch.from_numpy(values).split(lengths))


def clip_cov(**options):
    method = make_method("clip_cov", options, dual_clip=3.0)
    method.batch(NOTHING, AT)
    return method


def test_clip_cov_takes_some_tokens_within_the_bounds_out_of_the_loss():
    case, covariance = make_case(), covariance_of(make_case())
    low, high = np.quantile(covariance, [0.5, 0.9])
    method = clip_cov(fraction=0.2, low=low, high=high)
    loss, gradient, metrics, batch = run(method, case)
    selected, inside = selected_of(batch), (covariance > low) & (covariance < high)
    assert selected.sum() == int(0.2 * len(selected)) and selected[~inside].sum() == 0
    dense, rows = case.logprobs()
    terms = []
    for row, (old, _, advantage), out in zip(rows, columns(case), split(selected, case), strict=True):
        ratio = (row - old).exp()
        per_token = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.28))
        per_token = per_token.clamp_max(-3 * advantage) if advantage < 0 else per_token
        terms.append(torch.where(out, 0.0, per_token))
    check(loss, gradient, torch.cat(terms).mean(), dense)
    assert metrics["clip_cov/detached_fraction"] == pytest.approx(selected.mean())
    assert method.metrics() == {"clip_cov/candidate_fraction": inside.mean()}


def test_clip_cov_chooses_by_the_samplers_log_probabilities_before_anybody_scores():
    generator = np.random.default_rng(5)
    rows = [-generator.exponential(1.0, n).astype(np.float32) for n in (3, 5, 2, 6)]
    completions = tuple(Completion(np.ones(len(row), np.int32), row, 1.0, 0, "stop") for row in rows)
    group = Group(Prompt(0, "", (1, 2), {}), completions, tuple(Reward(float(r), bool(r)) for r in (1, 0, 0, 1)))
    method = make_method("clip_cov", {"fraction": 1.0, "low": 0.0, "high": 9.0}, dual_clip=3.0)
    batch = method.batch(Collected([group], [group], [], {}), AT)
    advantages = np.concatenate([np.full(len(r), s.advantage) for r, s in zip(rows, batch.sequences, strict=True)])

    def is_candidate(of: list[np.ndarray]) -> np.ndarray:
        logprobs = np.concatenate(of).astype(np.float64)
        return (logprobs - logprobs.mean()) * (advantages - advantages.mean()) > 0

    first, anew = is_candidate(rows), is_candidate(own := [row[::-1].copy() for row in rows])
    assert np.array_equal(selected_of(batch), first) and not np.array_equal(first, anew)
    assert method.metrics() == {"clip_cov/candidate_fraction": first.mean()}
    # and anew by the trainer's, where it scores the batch
    assert np.array_equal(selected_of(method.weigh(batch, Scores(own, rows), None)), anew)


def test_clip_cov_draws_anew_each_step_and_alike_on_every_rank():
    case = make_case()
    options = {"fraction": 0.1, "low": -100.0, "high": 100.0}
    first, again, other = (clip_cov(**options) for _ in range(3))
    other.batch(NOTHING, replace(AT, seed=4))
    drawn = [selected_of(m.weigh(case.batch, case.scores, None)) for m in (first, again, other)]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])


def test_clip_cov_without_a_candidate_is_grpo():
    case = make_case()
    loss, gradient, metrics, batch = run(clip_cov(low=1e6, high=1e7), case)
    plain = run(make_method("grpo", dual_clip=3.0), case)
    assert (loss, selected_of(batch).sum(), metrics["clip_cov/detached_fraction"]) == (plain[0], 0, 0.0)
    assert torch.equal(gradient, plain[1])
    assert {**plain[2], "clip_cov/detached_fraction": 0.0} == metrics


def test_kl_cov_holds_the_tokens_of_the_largest_covariance():
    case, covariance = make_case(), covariance_of(make_case())
    loss, gradient, metrics, batch = run(make_method("kl_cov", {"fraction": 0.15, "beta": 0.7}, **SEVERAL), case)
    expected = np.zeros(len(covariance), bool)
    expected[np.argsort(covariance)[-int(0.15 * len(covariance)) :]] = True
    assert np.array_equal(selected_of(batch), expected)
    dense, rows = case.logprobs()
    terms, penalties = [], []
    for row, (old, _, advantage), held in zip(rows, columns(case), split(expected, case), strict=True):
        penalties.append(0.7 * held * (row - old).abs())
        terms.append(-advantage * (row - old).exp() + penalties[-1])
    check(loss, gradient, torch.cat(terms).mean(), dense)
    assert metrics["kl_cov/penalty"] == pytest.approx(torch.cat(penalties).mean().item(), rel=1e-4)
    assert metrics["kl_cov/selected_fraction"] == pytest.approx(expected.mean())


@pytest.mark.parametrize("method", ["clip_cov", "kl_cov"])
def test_the_budget_is_at_least_one_token_and_the_selection_is_the_batchs(method):
    case = make_case()
    made = clip_cov(low=-100.0, high=100.0) if method == "clip_cov" else make_method(method, **SEVERAL)
    batch = made.weigh(case.batch, case.scores, None)
    assert selected_of(batch).sum() == 1
    if method == "kl_cov":  # the largest of all, in whichever minibatch it lies
        assert selected_of(batch).argmax() == covariance_of(case).argmax()


def test_advantages_of_single_tokens_count_as_they_are():
    case = make_case()
    first = case.batch.sequences[0]
    varied = np.linspace(-3, 3, first.num_response_tokens).astype(np.float32)
    batch = TrainBatch((replace(first, advantage=varied), *case.batch.sequences[1:]))
    weighed = make_method("kl_cov", **SEVERAL).weigh(batch, case.scores, None)
    logprobs = np.concatenate(case.scores.logprobs).astype(np.float64)
    rest = [np.full(s.num_response_tokens, s.advantage) for s in batch.sequences[1:]]
    advantages = np.concatenate([varied, *rest]).astype(np.float64)
    covariance = (logprobs - logprobs.mean()) * (advantages - advantages.mean())
    assert selected_of(weighed).argmax() == covariance.argmax()


@pytest.mark.parametrize(
    ("method", "options", "rl", "says"),
    [
        ("kl_cov", {}, {}, r"set rl\.minibatch_prompts below rl\.prompts_per_step 64"),
        ("kl_cov", {}, {"prompts_per_step": 8, "minibatch_prompts": 8}, r"set rl\.minibatch_prompts below"),
        ("clip_cov", {"low": 5.0, "high": 1.0}, {}, r"rl\.options\.low 5 is not below rl\.options\.high 1"),
        ("clip_cov", {"fraction": 0}, {}, r"rl\.options\.fraction"),
    ],
)
def test_what_makes_no_sense_is_refused(method, options, rl, says):
    with pytest.raises(ConfigError, match=says):
        make_method(method, options, **rl)
