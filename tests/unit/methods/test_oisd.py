"""OISD: both terms in closed form, what is sampled for the second, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_reheat.config import Config
from megatron_reheat.errors import ConfigError
from megatron_reheat.losses.oisd import attention_loss, sample_positions, think_loss
from megatron_reheat.methods import choose_method
from megatron_reheat.methods.grpo import Tools
from megatron_reheat.methods.oisd import OISD
from megatron_reheat.metrics import MetricSums
from megatron_reheat.parallel.attention import Attention
from megatron_reheat.parallel.packing import MicroBatch, make_microbatches
from megatron_reheat.parallel.vocab import VocabLogits
from megatron_reheat.recipe import parse_config
from megatron_reheat.types import At, TrainBatch, TrainSequence

VOCAB = 11
# prompt, response, advantage
SHAPES = [(2, 3, 1.5), (1, 5, -0.4), (3, 1, -2.0)]
TAU, COEF, CLIP = 1.4, 0.8, 1.0


def micro(shapes: list[tuple[int, int, float]] = SHAPES, alignment: int = 8) -> MicroBatch:
    """The sequences in this order, with padding at the end."""
    generator = np.random.default_rng(0)
    batch = TrainBatch(
        tuple(TrainSequence(generator.integers(0, VOCAB, p + r).astype(np.int32), p, a) for p, r, a in shapes)
    )
    (made,) = make_microbatches(batch, data_rank=0, data_size=1, microbatch_tokens=999, alignment=alignment)
    return made


def nothing(vocab: Any, micro: MicroBatch) -> tuple[Tensor, MetricSums]:
    return torch.zeros((), dtype=torch.float64), MetricSums()


def signed_weights(made: MicroBatch) -> Tensor:
    """[T] clip(A) / (sequences x |o|) at the positions that predict a response, by hand."""
    weights = torch.zeros(len(made.tokens), dtype=torch.float64)
    start = 0
    for index in made.sequence_indices:
        prompt, response, advantage = SHAPES[index]
        first = start + prompt - 1
        weights[first : first + response] = max(-CLIP, min(CLIP, advantage)) / (len(SHAPES) * response)
        start += prompt + response
    return weights


def test_the_think_term_in_closed_form():
    made = micro()
    generator = torch.Generator().manual_seed(1)
    y, z = (2 * torch.randn(len(made.tokens), VOCAB, generator=generator, dtype=torch.float64) for _ in range(2))
    counted = made.loss_mask.bool()
    y[~counted] *= 100  # what stands at other positions does not count
    y.requires_grad_()
    z.requires_grad_()
    readings = {"layer4": VocabLogits(y, VOCAB)}
    options = {"policy": nothing, "layer": 4, "temperature": TAU, "coef": COEF, "advantage_clip": CLIP}
    loss, sums = think_loss(VocabLogits(z, VOCAB), replace(made, readings=readings), **options)
    loss.backward()

    p, u = (y[counted].detach() / TAU).softmax(-1), (z[counted].detach() / TAU).softmax(-1)
    mixed = (0.5 * (p + u)).log()
    js = 0.5 * (p * (p.log() - mixed) + u * (u.log() - mixed)).sum(-1)
    weights = signed_weights(made)[counted]
    assert float(weights.abs().sum()) > 0.5
    torch.testing.assert_close(loss.detach(), COEF * (weights * js).sum(), rtol=1e-6, atol=0)  # weights are float32
    g = 0.5 * (p.log() - mixed)
    expected = COEF * (weights / TAU)[:, None] * p * (g - (p * g).sum(-1, keepdim=True))
    torch.testing.assert_close(y.grad[counted], expected, rtol=1e-5, atol=1e-9)
    assert y.grad[~counted].abs().max() == 0
    assert z.grad is None  # the last layer is only a teacher
    metrics = sums.reduced()
    assert metrics["oisd/think_js"] == pytest.approx(float(js.mean()))
    q = y[counted].detach().softmax(-1)
    assert metrics["oisd/layer_entropy"] == pytest.approx(float(-(q * q.log()).sum(-1).mean()))
    assert metrics["oisd/think_loss"] == pytest.approx(float((weights * js).sum()))


def test_advantage_decides_the_direction():
    """One step down the gradient: nearer to the last layer where the advantage is positive, farther where it is negative."""
    for advantage in (0.5, -0.5):
        made = micro([(1, 4, advantage)])
        y, z = (torch.randn(len(made.tokens), VOCAB, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
        y.requires_grad_()
        options = {"policy": nothing, "layer": 1, "temperature": 1.0, "coef": 1.0, "advantage_clip": CLIP}

        def js(logits: Tensor) -> tuple[Tensor, float]:
            view = replace(made, readings={"layer1": VocabLogits(logits, VOCAB)})  # noqa: B023
            loss, sums = think_loss(VocabLogits(z, VOCAB), view, **options)  # noqa: B023
            return loss, sums.reduced()["oisd/think_js"]

        loss, before = js(y)
        loss.backward()
        after = js((y - 0.5 * y.grad).detach())[1]
        assert (after < before) == (advantage > 0) and after != before


def test_sampled_positions_by_hand():
    # 20 tokens of prompt and 10 of response; then 1 and 2
    made = micro([(20, 10, 1.0), (1, 2, 1.0)], alignment=8)
    assert made.cu_seqlens.tolist() == [0, 30, 33, 40]
    positions, shares = sample_positions(made, queries=3, window=4, stride=6)
    # predicting are 19..28; the middles of its thirds; then 30 and 31, all of them
    assert positions.queries.tolist() == [20, 24, 27, 30, 31]
    keys = [sorted(k[v].tolist()) for k, v in zip(positions.keys, positions.valid, strict=True)]
    assert keys == [
        [0, 6, 12, 17, 18, 19, 20],  # 16 is the last one before the window, 18 is in it
        [0, 6, 12, 18, 21, 22, 23, 24],
        [0, 6, 12, 18, 24, 25, 26, 27],  # 23 would be the last: 18 is the last of the stride
        [30],
        [30, 31],
    ]
    # each sequence's shares add up to half, whatever its length
    torch.testing.assert_close(shares, torch.tensor([1 / 6, 1 / 6, 1 / 6, 1 / 4, 1 / 4]))


def test_every_position_is_a_query_where_there_are_enough():
    made = micro([(3, 7, 1.0)])
    positions, shares = sample_positions(made, queries=99, window=2, stride=1)
    assert positions.queries.tolist() == list(range(2, 9)) and float(shares.sum()) == pytest.approx(1.0)
    keys = [sorted(k[v].tolist()) for k, v in zip(positions.keys, positions.valid, strict=True)]
    assert keys == [list(range(q + 1)) for q in range(2, 9)]  # window and stride 1: every key, none twice


def test_a_micro_batch_without_a_sequence_has_no_attention_term():
    batch = TrainBatch((TrainSequence(np.arange(4, dtype=np.int32), 2, 1.0),))
    _, empty = (
        make_microbatches(batch, data_rank=r, data_size=2, microbatch_tokens=9, alignment=1)[0] for r in range(2)
    )
    layer = Attention(torch.ones(1, 2, 4, requires_grad=True), torch.ones(1, 1, 4))
    options = {"layer": 1, "last_layer": 2, "coef": 1.0, "advantage_clip": 1.0, "queries": 2, "window": 2, "stride": 2}
    loss, sums = attention_loss({1: layer, 2: layer}, empty, **options)
    assert float(loss.detach()) == 0.0 and sums.reduced() == {}


def test_the_attention_term_in_closed_form():
    made = micro()
    generator = torch.Generator().manual_seed(2)

    def layer() -> Attention:
        q, k = (2 * torch.randn(len(made.tokens), heads, 4, generator=generator).double() for heads in (2, 1))
        return Attention(q.requires_grad_(), k.requires_grad_())

    own, last = layer(), layer()
    options = {
        "layer": 3,
        "last_layer": 7,
        "coef": COEF,
        "advantage_clip": CLIP,
        "queries": 2,
        "window": 99,
        "stride": 9,
    }
    loss, sums = attention_loss({3: own, 7: last}, made, **options)
    loss.backward()
    queries = []  # at most two of a response: the middles of its halves
    start, expected, divergences = 0, 0.0, []
    for index in made.sequence_indices:
        prompt, response, advantage = SHAPES[index]
        chosen = {1: [0], 3: [0, 2], 5: [1, 3]}[response]
        for t in (start + prompt - 1 + c for c in chosen):
            rows = []
            for head in range(2):
                p, u = ((a.keys[start : t + 1, 0] @ a.queries[t, head] / 2).detach().softmax(0) for a in (own, last))
                m = 0.5 * (p + u)
                rows.append(float(0.5 * ((p * (p / m).log()).sum() + (u * (u / m).log()).sum())))
            divergences.append(sum(rows) / 2)
            expected += max(-CLIP, min(CLIP, advantage)) * divergences[-1] / (len(chosen) * len(SHAPES))
            queries.append(t)
        start += prompt + response
    assert float(loss.detach()) == pytest.approx(COEF * expected, rel=1e-6)
    metrics = sums.reduced()
    assert metrics["oisd/attention_loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["oisd/attention_js"] == pytest.approx(sum(divergences) / len(divergences), rel=1e-6)
    assert last.queries.grad is None and last.keys.grad is None  # only a teacher
    assert set(own.queries.grad.abs().sum((1, 2)).nonzero()[:, 0].tolist()) <= set(queries)


def recipe(**sections: Any) -> Config:
    tree = {"model": {"hf_path": "m"}, "data": {"path": "p"}, "rl": {"method": "oisd"}}
    return parse_config({**tree, **{name: {**tree.get(name, {}), **keys} for name, keys in sections.items()}})


def made_of(layers: int = 36, **options: Any) -> OISD:
    config = recipe(rl={"options": options})
    tools = Tools(SimpleNamespace(num_hidden_layers=layers), lambda ids: "", lambda prompt, solution: None)
    method = choose_method(config).make(config, tools)
    assert isinstance(method, OISD)
    return method


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"fused_head": False}}, r"model\.fused_head=false makes all logits at once; set model\.fused_head=true"),
        ({"model": {"recompute": "full"}}, r"model\.recompute=full throws a layer's queries .* set model\.recompute=selective"),
        ({"parallel": {"context": 2}}, r"with parallel\.context 2 no rank has all keys .* set parallel\.context=1"),
        ({"rl": {"options": {"think_coef": 0, "attention_coef": 0}}}, "both 0, which leaves GRPO"),
        ({"rl": {"options": {"layer": 0}}}, r"rl\.options\.layer"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        choose_method(recipe(**{**changes, "rl": {"method": "oisd", **changes.get("rl", {})}}))


def test_what_keeps_the_layers_inputs_is_fine():
    choose_method(recipe(model={"recompute": "selective"}))
    for section in ({"model": {"recompute": "full"}}, {"parallel": {"context": 2}}):
        choose_method(recipe(**section, rl={"method": "oisd", "options": {"attention_coef": 0}}))


def test_the_layer_comes_before_the_last():
    assert made_of(layers=28, layer=27).taps == (27,)
    with pytest.raises(
        ConfigError, match=r"rl\.options\.layer 28 has to come before the last of the model's 28 layers"
    ):
        made_of(layers=28, layer=28)


def test_a_term_without_a_coefficient_costs_nothing():
    at = At(step=1, rl_step=1, stage_step=0, temperature=1.0, seed=0)
    both = made_of()
    assert both.taps == (6,) and both.attention().layers == (6, 36) and both.loss(at).func is think_loss
    assert made_of(attention_coef=0).attention() is None
    attention_only = made_of(think_coef=0)
    assert attention_only.taps == () and attention_only.loss(at).func is not think_loss
