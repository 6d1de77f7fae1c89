"""OPEFO: the entropy's change a token makes, and weights that balance it over the batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_reheat.errors import ConfigError
from megatron_reheat.methods import choose_method
from megatron_reheat.methods.opefo import MEAN_FLOW, entropy_change
from megatron_reheat.parallel.vocab import VocabLogits
from tests.unit.methods.builders import Scorer, at, collected, group, make, random_scores, recipe


def test_the_papers_example():
    """p = (0.8, 0.2), A = (0.2, -0.8): the mean over what is sampled is -0.115340."""
    p, advantages = np.array([0.8, 0.2]), np.array([0.2, -0.8])
    logprobs = np.log(p).astype(np.float32)
    entropies = np.full(2, -(p * np.log(p)).sum(), np.float32)
    assert p @ entropy_change(advantages, logprobs, entropies) == pytest.approx(-0.115340, abs=1e-6)


def test_the_exact_form_is_the_derivative_of_the_entropy():
    """One step on one sampled token, by autograd in float64, with the vocabulary's own answer."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(40, 11, generator=generator) * 2).double()
    sampled = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    advantages = torch.randn(40, generator=generator)
    z = logits.clone().requires_grad_()
    log_q = z.log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum(-1)
    (along,) = torch.autograd.grad(entropy.sum(), z)
    step = torch.nn.functional.one_hot(sampled, 11) - log_q.detach().exp()  # of the sampled log-probability
    expected = advantages * (along * step).sum(-1)
    vocab = VocabLogits(logits.float(), 11)
    result = vocab.logprobs(sampled)
    actual = entropy_change(
        advantages.numpy(), result.logprobs.numpy(), result.entropy.numpy(), vocab.mean_entropy_flow().numpy()
    )
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["proxy", "exact"])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_weights_balance_the_predicted_change_of_the_whole_batch(variant, aggregation):
    method = make(recipe("opefo", {"variant": variant}, rl={"aggregation": aggregation}))
    own = collected(group(0, [3, 5, 2], [1.0, 0.0, 0.0]), group(1, [4, 1, 6], [0.0, 1.0, 1.0]))
    batch = method.batch(own, at())
    scores = random_scores(batch)
    if variant == "exact":
        flows = [np.random.default_rng(9).normal(0, 0.1, len(row)).astype(np.float32) for row in scores.logprobs]
        scores = replace(scores, columns={MEAN_FLOW: flows})
    weighed = method.weigh(batch, scores, Scorer())

    raised = lowered = 0.0
    changes = []
    for i, sequence in enumerate(batch.sequences):
        row = []
        for t in range(sequence.num_response_tokens):
            logp, entropy = float(scores.logprobs[i][t]), float(scores.entropies[i][t])
            p = np.exp(logp)
            flow = (1 - p) ** 2 * (logp + entropy)
            if variant == "exact":
                flow = p * (logp + entropy) - float(scores.columns[MEAN_FLOW][i][t])
            change = -sequence.advantage * flow
            row.append(change)
            share = 1.0 if aggregation == "token_mean" else 1 / sequence.num_response_tokens
            raised += share * max(change, 0.0)
            lowered += share * max(-change, 0.0)
        changes.append(row)
    lam = (lowered - raised) / (lowered + raised)
    assert abs(lam) > 0.01
    rows = zip(weighed.sequences, batch.sequences, changes, scores.logprobs, strict=True)
    for sequence, before, row, logprobs in rows:
        expected = [before.advantage * (1 + lam if change > 0 else 1 - lam) for change in row]
        np.testing.assert_allclose(sequence.advantage, expected, rtol=1e-5)
        assert sequence.advantage.dtype == np.float32
        np.testing.assert_array_equal(sequence.old_logprobs, logprobs)
    assert method.metrics()["opefo/lambda"] == pytest.approx(lam, rel=1e-5)
    assert method.metrics()["opefo/raised"] == pytest.approx(raised, rel=1e-5)


def test_without_an_advantage_nothing_is_weighed():
    method = make(recipe("opefo"))
    batch = method.batch(collected(group(0, [3, 2], [1.0, 1.0])), at())
    weighed = method.weigh(batch, random_scores(batch), Scorer())
    assert method.metrics()["opefo/lambda"] == 0 and not any(s.advantage.any() for s in weighed.sequences)


def test_only_the_exact_form_asks_for_more_than_the_ordinary_scores():
    assert not make(recipe("opefo")).columns
    assert set(make(recipe("opefo", {"variant": "exact"})).columns) == {MEAN_FLOW}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rl": {"minibatch_prompts": 2}}, "leave rl.minibatch_prompts empty"),
        ({"rollout": {"mode": "server", "overlap": True}, "rl": {"tis_cap": 2.0}}, "rollout.overlap"),
        ({"rollout": {"temperature": 0.9}}, "rollout.temperature is 0.9; set it to 1"),
        ({"controller": {"action": "rollout_temperature"}}, "choose another action"),
    ],
)
def test_what_is_not_strictly_on_policy_is_refused(sections, message):
    with pytest.raises(ConfigError) as caught:
        choose_method(recipe("opefo", **sections))
    assert message in str(caught.value)


def test_one_minibatch_of_all_prompts_is_one_update():
    choose_method(recipe("opefo", rl={"minibatch_prompts": 4}))
