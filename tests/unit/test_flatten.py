"""The temperature that makes a policy's entropy what was asked for, found on any rising curve."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_reheat.config import ControllerConfig
from megatron_reheat.stages.controller import Controller, ControllerState, Verdict
from megatron_reheat.stages.flatten import MAX_TEMPERATURE, TOLERANCE, _solve

Curve = Callable[[float], float]


def of_logits(logits: list[float]) -> Curve:
    def entropy(temperature: float) -> float:
        weights = [math.exp(z / temperature) for z in logits]
        total = sum(weights)
        return -sum(w / total * math.log(w / total) for w in weights)

    return entropy


CURVES: dict[str, Curve] = {
    "two tokens": of_logits([4.0, 0.0]),
    "a sure one among many": of_logits([12.0] + [0.0] * 999),  # flat, then steep
    "even": of_logits([float(i) / 10 for i in range(40)]),
    "a line": lambda t: 0.01 + 0.1 * (t - 1),
    "a late step": lambda t: 0.05 + 1.0 / (1 + math.exp(-40 * (t - 3.7))),
    "an early step": lambda t: 0.05 + 1.0 / (1 + math.exp(-400 * (t - 1.02))),
}


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_the_temperature_is_found_in_a_few_passes(name: str, share: float) -> None:
    curve, calls = CURVES[name], []

    def entropy(temperature: float) -> float:
        calls.append(temperature)
        return curve(temperature)

    low, high = curve(1.0), curve(MAX_TEMPERATURE)
    target = low + share * (high - low)
    temperature, after = _solve(entropy, low, target)
    assert after == curve(temperature) and 1 <= temperature < MAX_TEMPERATURE
    assert abs(after - target) <= TOLERANCE * target
    assert len(calls) == len(set(calls)) <= 20


def test_what_is_flat_enough_stays_and_what_cannot_be_reached_is_left_at_the_limit() -> None:
    curve = CURVES["two tokens"]
    assert _solve(curve, curve(1.0), curve(1.0) / 2) == (1.0, curve(1.0))
    assert _solve(curve, curve(1.0), 5.0) == (MAX_TEMPERATURE, curve(MAX_TEMPERATURE))


def test_the_controller_flattens_in_place_of_reheating() -> None:
    config = ControllerConfig(action="flatten", smoothing_steps=2, cooldown_steps=3, max_rounds=2)
    controller = Controller(config)
    assert [controller.observe_rl(0.05) for _ in range(2)] == [Verdict.CONTINUE, Verdict.FLATTEN]
    assert controller.explain(Verdict.FLATTEN, 0.05) == "entropy 0.050 < 0.08 nats: collapsed, flattened"
    controller.carry_out(Verdict.FLATTEN)
    assert controller.state == ControllerState(stage="rlvr", round=1, cooling=True)
    assert [controller.observe_rl(0.05) for _ in range(3)] == [
        *[Verdict.CONTINUE] * 2,
        Verdict.FLATTEN,
    ]  # after cooling
    controller.carry_out(Verdict.FLATTEN)
    assert {controller.observe_rl(0.01) for _ in range(9)} == {Verdict.CONTINUE}  # max_rounds


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_is_that_of_sampling_at_the_temperature_but_for_the_norm(tied: bool) -> None:
    temperature = 1.3
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).double()
    tokens, advantages = torch.randint(32, (3, 12)), torch.randn(3, 11).double()

    def gradients(at: float) -> dict[str, Tensor]:
        model.zero_grad()
        logprobs = (model(tokens).logits[:, :-1] / at).log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        (-advantages * logprobs).mean().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    sampled_hot = gradients(temperature)
    with torch.no_grad():
        model.model.norm.weight /= temperature
    flattened = gradients(1.0)
    for name, gradient in flattened.items():
        factor = temperature if name == "model.norm.weight" else 1.0
        assert (gradient - factor * sampled_hot[name]).abs().max() < 1e-12 * gradient.abs().max() + 1e-14, name
