"""SDPG: the anchors, the whole loss in closed form, the schedule, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_reheat.config import Config
from megatron_reheat.errors import ConfigError
from megatron_reheat.losses.sdpg import reference_anchor
from megatron_reheat.methods import choose_method
from megatron_reheat.methods.grpo import Tools
from megatron_reheat.methods.sdpg import SDPG
from megatron_reheat.parallel.packing import MicroBatch, make_microbatches
from megatron_reheat.parallel.vocab import VocabLogits
from megatron_reheat.recipe import parse_config
from megatron_reheat.types import At, Completion, Group, Prompt, Reward, Scores, TrainBatch

VOCAB = 13
AT = At(step=12, rl_step=10, stage_step=0, temperature=1.25, seed=0)
OPTIONS = {"beta": 0.8, "alpha": 0.5, "warmup_steps": 40, "decay_steps": 60, "total_steps": 100}
BETA = 0.8 * 10 / 40
# response tokens, reward; a group of four of which two are right
RESPONSES = [([3, 4, 5], 0.0), ([6, 7], 1.0), ([8], 1.0), ([2, 2, 2, 1], 0.0)]
ADVANTAGE = 0.5 / (1 / math.sqrt(3) + 1e-6)


def recipe(**sections: Any) -> Config:
    tree = {
        "model": {"hf_path": "m"},
        "data": {"path": "p", "hint_template": "{prompt} {solution}"},
        "rollout": {"max_tokens": 8},
        "rl": {"method": "sdpg", "options": OPTIONS, "dynamic_sampling": False},
    }
    return parse_config({**tree, **{name: {**tree.get(name, {}), **keys} for name, keys in sections.items()}})


def made(**rl: Any) -> SDPG:
    """Its teacher is shown the solution's tokens behind the prompt's."""
    options = {**OPTIONS, **rl.pop("options", {})}
    config = recipe(rl={"method": "sdpg", "options": options, **rl})

    def hinted(prompt: Prompt, solution: str | None) -> Any:
        return np.array([*prompt.token_ids, *map(int, (solution or "").split())], np.int32)

    hf = SimpleNamespace(max_position_embeddings=1 << 16)
    tools = Tools(hf, lambda ids: " ".join(map(str, ids)), hinted)
    method = choose_method(config).make(config, tools)
    assert isinstance(method, SDPG)
    return method


class Reference:
    """A stand-in for the frozen policy: token t of a response has the log-probability -t / 2."""

    asked: int = 0

    def score(self, batch: TrainBatch) -> Scores:
        raise AssertionError("the policy was scored already")

    def reference(self, batch: TrainBatch) -> Scores:
        self.asked += 1
        columns = [-0.5 * np.arange(s.num_response_tokens, dtype=np.float32) for s in batch.sequences]
        return Scores(columns, columns)


def weighed(method: SDPG, responses: Any = RESPONSES) -> TrainBatch:
    ids = [np.array(r, np.int32) for r, _ in responses]
    completions = tuple(Completion(i, np.full(len(i), -1.5, np.float32), AT.temperature, 0, "stop") for i in ids)
    rewards = tuple(Reward(value, value > 0) for _, value in responses)
    batch = TrainBatch(tuple(method.sequences(Group(Prompt(0, "", (9, 10), {}), completions, rewards), AT)))
    old = [np.full(s.num_response_tokens, -2.0, np.float32) for s in batch.sequences]
    return method.weigh(batch, Scores(old, old), Reference())


def prepared(method: SDPG, batch: TrainBatch) -> tuple[MicroBatch, Tensor, Tensor]:
    """One micro-batch of counted positions, and the policy's and its teacher's logits there, in float64."""
    (micro,) = make_microbatches(batch, data_rank=0, data_size=1, microbatch_tokens=999, alignment=1)
    micro = micro.at(micro.loss_mask.nonzero()[:, 0])
    generator = torch.Generator().manual_seed(3)
    z, u = (2 * torch.randn(len(micro.tokens), VOCAB, generator=generator, dtype=torch.float64) for _ in range(2))
    return micro, z.requires_grad_(), u.requires_grad_()


def run(method: SDPG, micro: MicroBatch, z: Tensor, u: Tensor) -> tuple[Tensor, dict[str, float]]:
    loss, sums = method.loss(AT)(VocabLogits(z, VOCAB), replace(micro, readings={"teacher": VocabLogits(u, VOCAB)}))
    return loss, sums.reduced()


def dense_loss(
    micro: MicroBatch, z: Tensor, u: Tensor, *, gate: bool = True, weighted: bool = True, alpha: float = 0.5,
    cap: float | None = None, max_kl: float = 20.0,
) -> Tensor:  # fmt: skip
    """By hand, UFKL, from the responses above: the second is the hint of all others, the third that of the second."""
    log_p, log_u = (z / 1.25).log_softmax(-1), (u.detach() / 1.25).log_softmax(-1)
    total, count = torch.zeros((), dtype=torch.float64), sum(len(r) for r, _ in RESPONSES)
    row = 0
    for index in micro.sequence_indices:
        response, reward = RESPONSES[index]
        advantage = ADVANTAGE if reward else -ADVANTAGE
        for t, token in enumerate(response):
            logp = log_p[row, token]
            rho, w = (logp + 2.0).exp(), (logp + 0.5 * t).exp()
            per_token = torch.maximum(-advantage * rho, -advantage * rho.clamp(0.8, 1.28))
            if advantage < 0:
                per_token = torch.minimum(per_token, torch.full_like(per_token, -10 * advantage))
            kl = (log_p[row].exp() * (log_p[row] - log_u[row])).sum()
            kl = kl if kl <= max_kl else kl.detach() * 0 + max_kl
            terms = alpha * (1 / w + w.log())
            if advantage > 0 or not gate:
                terms = terms + BETA * kl
            per_token = per_token + (rho.detach() if weighted else 1.0) * terms
            if cap is not None:
                per_token = per_token * min(math.exp(-2.0 + 1.5), cap)
            total = total + per_token / count
            row += 1
    return total


# -- the anchors ---------------------------------------------------------------------------------------------------------


LN_2 = math.log(2.0)


@pytest.mark.parametrize(
    ("kind", "value"),
    [("UFKL", 0.5 + LN_2), ("URKL", 0.5 * LN_2**2), ("FKL", 0.5), ("RKL", 0.5 * (LN_2 + 1) ** 2)],
)
def test_an_anchors_value_at_twice_the_references_probability(kind: Any, value: float):
    assert float(reference_anchor(torch.tensor(LN_2, dtype=torch.float64), kind)) == pytest.approx(value)


@pytest.mark.parametrize("kind", ["UFKL", "URKL", "FKL", "RKL"])
def test_the_mean_gradient_of_an_anchor_is_that_of_the_kl(kind: Any):
    """Exactly: the mean is taken over the whole vocabulary."""
    generator = torch.Generator().manual_seed(0)
    z, r = (torch.randn(VOCAB, generator=generator, dtype=torch.float64) for _ in range(2))
    z.requires_grad_()
    log_p, log_ref = z.log_softmax(-1), r.log_softmax(-1)
    (surrogate,) = torch.autograd.grad((log_p.detach().exp() * reference_anchor(log_p - log_ref, kind)).sum(), z)
    log_p = z.log_softmax(-1)
    forward, reverse = (log_ref.exp() * (log_ref - log_p)).sum(), (log_p.exp() * (log_p - log_ref)).sum()
    (expected,) = torch.autograd.grad(forward if kind.endswith("FKL") else reverse, z)
    torch.testing.assert_close(surrogate, expected, rtol=1e-10, atol=1e-13)


def test_an_anchor_is_bounded_and_flat_far_away():
    far = torch.tensor([-50.0, 50.0], dtype=torch.float64, requires_grad=True)
    value = reference_anchor(far, "UFKL")
    value.sum().backward()
    assert value.tolist() == pytest.approx([math.exp(20) - 20, math.exp(-20) + 20])
    assert far.grad.tolist() == [0, 0]


# -- the loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rl", "dense"),
    [
        ({}, {}),
        ({"options": {"gate": False}}, {"gate": False}),
        ({"options": {"importance_weighted": False}}, {"weighted": False}),
        ({"options": {"alpha": 0.0}}, {"alpha": 0.0}),
        ({"tis_cap": 2.0}, {"cap": 2.0}),
    ],
)
def test_value_and_gradient_are_the_dense_ones(rl: dict[str, Any], dense: dict[str, Any]):
    method = made(**rl)
    micro, z, u = prepared(method, weighed(method))
    loss, metrics = run(method, micro, z, u)
    (gradient,) = torch.autograd.grad(loss, z)
    expected = dense_loss(micro, z, u, **dense)
    (expected_gradient,) = torch.autograd.grad(expected, z)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0.0)  # advantages and shares are float32
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-8)
    distilled = 10 if dense.get("gate") is False else 3
    assert metrics["sdpg/distilled_fraction"] == pytest.approx(distilled / 10)
    assert metrics["sdpg/clamped_fraction"] == 0 and ("sdpg/anchor" in metrics) == (dense.get("alpha") != 0)


def test_the_teacher_gets_no_gradient():
    method = made()
    micro, z, u = prepared(method, weighed(method))
    run(method, micro, z, u)[0].backward()
    assert u.grad is None and z.grad is not None


def test_a_token_too_far_from_its_teacher_has_no_gradient_of_it():
    method = made()
    micro, z, u = prepared(method, weighed(method))
    row = next(i for i, a in enumerate(micro.advantages.tolist()) if a > 0)
    with torch.no_grad():
        u[row, z[row].argmax()] = -400.0
    loss, metrics = run(method, micro, z, u)
    assert metrics["sdpg/clamped_fraction"] == pytest.approx(1 / 3) and metrics["sdpg/teacher_kl"] > 10
    torch.testing.assert_close(loss, dense_loss(micro, z, u), rtol=1e-6, atol=0.0)
    (gradient,) = torch.autograd.grad(loss, z)
    (expected,) = torch.autograd.grad(dense_loss(micro, z, u), z)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
    (unclamped,) = torch.autograd.grad(dense_loss(micro, z, u, max_kl=math.inf), z)
    assert (unclamped - expected)[row].norm() > 1e-3  # it would have had one


def test_a_sequence_without_a_hint_is_not_distilled():
    method = made()
    alone = [([3, 4, 5], 0.0), ([6, 7], 1.0), ([8], 0.0)]  # the only success has no other one to be shown
    batch = weighed(method, alone)
    assert [s.privileged_token_ids is None for s in batch.sequences] == [False, True, False]
    micro, z, u = prepared(method, batch)
    metrics = run(method, micro, z, u)[1]
    assert metrics["sdpg/distilled_fraction"] == 0 and "sdpg/teacher_kl" not in metrics
    assert method.metrics()["sdpg/hinted_fraction"] == pytest.approx(2 / 3)


def test_strictly_on_policy_the_gradient_is_the_papers_purely_on_policy_form():
    """-A grad log pi + beta 1[A > 0] grad KL + alpha (1 - 1/w) grad log pi."""
    method = made()
    batch = weighed(method)
    micro, z, u = prepared(method, batch)
    log_p = (z / 1.25).log_softmax(-1)
    logp = log_p.gather(-1, micro.targets[:, None])[:, 0]
    micro = replace(micro, old_logprobs=logp.detach())
    (gradient,) = torch.autograd.grad(run(method, micro, z, u)[0], z, retain_graph=True)
    w = (logp - micro.extra["ref_logprobs"]).detach().exp()
    kl = (log_p.exp() * (log_p - (u.detach() / 1.25).log_softmax(-1))).sum(-1)
    a = micro.advantages
    paper = (-a * logp + BETA * (a > 0) * kl + 0.5 * (1 - 1 / w) * logp).mean()
    torch.testing.assert_close(gradient, torch.autograd.grad(paper, z)[0], rtol=1e-5, atol=1e-8)


# -- the step ------------------------------------------------------------------------------------------------------------


def test_beta_rises_then_falls_to_zero():
    schedule = made(options={"beta": 1e-3, "warmup_steps": 50, "decay_steps": 350, "total_steps": 400}).beta
    values = [schedule(k) for k in (1, 25, 50, 225, 399, 400, 500)]
    assert values == pytest.approx([2e-5, 5e-4, 1e-3, 5e-4, 1e-3 / 350, 0.0, 0.0])
    constant = made(options={"beta": 1e-3, "warmup_steps": 0, "decay_steps": 0, "total_steps": 5}).beta
    assert [constant(k) for k in (1, 4, 6)] == [1e-3] * 3
    assert made().metrics()["sdpg/beta"] == 0.0  # before the first step


def test_the_schedule_ends_with_the_run_by_default():
    method = SDPG(recipe(run={"steps": 400}), SDPG.Options(), made().tools)
    assert method.beta(225) == pytest.approx(5e-4) and method.beta(400) == 0.0


@pytest.mark.parametrize("gate", [True, False])
def test_the_teacher_reads_what_is_distilled_behind_the_hint_and_the_reference_is_scored_once(gate: bool):
    method, batch = made(options={"gate": gate}), weighed(made())
    unhinted = replace(batch.sequences[1], privileged_token_ids=None)
    view = method.views(TrainBatch((*batch.sequences, unhinted)))["teacher"]
    right = [[9, 10, 8, 6, 7], [9, 10, 6, 7, 8]]
    wrong = [] if gate else [9, 10, 6, 7, 3, 4, 5]
    assert [s.token_ids.tolist() for s in view.sequences[:3]] == [wrong, *right]
    assert view.sequences[4].token_ids.size == 0 == view.sequences[4].num_response_tokens
    assert batch.sequences[0].extra["ref_logprobs"].tolist() == [0.0, -0.5, -1.0]
    assert batch.sequences[0].extra["hinted"].tolist() == [1.0, 1.0, 1.0]


def test_without_an_anchor_there_is_no_reference():
    config = recipe()
    assert SDPG.needs_reference(config, SDPG.Options()) and not SDPG.needs_reference(config, SDPG.Options(alpha=0))
    assert "ref_logprobs" not in weighed(made(options={"alpha": 0.0})).sequences[0].extra


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"hint_template": None}}, r"give data\.hint_template"),
        ({"data": {"hint_template": "{prompt}"}}, r"set rl\.options\.hint=record"),
        ({"model": {"fused_head": False}}, r"set model\.fused_head=true"),
        ({"rl": {"method": "sdpg", "options": {}}}, r"50 \+ decay_steps 350 exceed run\.steps 100, .* lower them"),
        ({"rl": {"method": "sdpg", "options": {**OPTIONS, "total_steps": 99}}}, r"exceed rl\.options\.total_steps 99"),
        ({"rl": {"method": "sdpg", "options": {**OPTIONS, "beta": 0}}}, r"rl\.options\.beta"),
        ({"rl": {"method": "sdpg", "options": OPTIONS, "kl_coef": 0.1}}, r"set rl\.kl_coef=0"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        choose_method(recipe(**changes))


def test_full_recomputation_is_fine():
    choose_method(recipe(model={"recompute": "full"}))
