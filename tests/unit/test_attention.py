"""Attention at a few positions, and its divergence from another layer's, against dense float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_reheat.parallel import attention as module
from megatron_reheat.parallel.attention import Attention, Positions

TOKENS, HEADS, GROUPS, CHANNELS = 9, 6, 2, 4


def layer(seed: int, *, scale: float = 1.5, dtype: torch.dtype = torch.float64) -> Attention:
    generator = torch.Generator().manual_seed(seed)
    q = scale * torch.randn(TOKENS, HEADS, CHANNELS, generator=generator, dtype=torch.float64)
    k = scale * torch.randn(TOKENS, GROUPS, CHANNELS, generator=generator, dtype=torch.float64)
    return Attention(q.to(dtype).requires_grad_(), k.to(dtype).requires_grad_())


# four queries with one to four keys each
KEYS = [[0], [1, 3], [2, 4, 5], [0, 3, 6, 8]]
QUERIES = [0, 3, 5, 8]
POSITIONS = Positions(
    torch.tensor(QUERIES),
    torch.tensor([row + [QUERIES[i]] * (4 - len(row)) for i, row in enumerate(KEYS)]),
    torch.tensor([[j < len(row) for j in range(4)] for row in KEYS]),
)


def dense(own: Attention, other: Attention) -> Tensor:
    rows = []
    for query, keys in zip(QUERIES, KEYS, strict=True):
        by_head = []
        for head in range(HEADS):
            p, q = (
                (a.keys[keys, head // (HEADS // GROUPS)] @ a.queries[query, head] / math.sqrt(CHANNELS)).softmax(0)
                for a in (own, other.detached())
            )
            m = 0.5 * (p + q)
            by_head.append(0.5 * ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()))
        rows.append(torch.stack(by_head).mean())
    return torch.stack(rows)


@pytest.mark.parametrize("gathered", [1, 1 << 20])  # a query at a time, all at once
def test_divergence_and_gradients_are_the_dense_ones(gathered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GATHERED", gathered)
    own, other = layer(0), layer(1)
    weights = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
    js = own.js_to(other, POSITIONS)
    (js * weights).sum().backward()
    gradients = own.queries.grad, own.keys.grad
    assert other.queries.grad is None and other.keys.grad is None
    own.queries.grad = own.keys.grad = None
    expected = dense(own, other)
    (expected * weights).sum().backward()
    torch.testing.assert_close(js, expected, rtol=1e-12, atol=1e-14)
    for mine, theirs in zip(gradients, (own.queries.grad, own.keys.grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)
    assert js[0].item() == pytest.approx(0.0, abs=1e-15)  # one key: nothing to disagree about


def test_it_is_zero_of_the_same_layer_and_at_most_ln_2() -> None:
    own = layer(0)
    js = own.js_to(own, POSITIONS)
    js.sum().backward()
    assert js.abs().max() < 1e-15 and own.queries.grad.abs().max() < 1e-15
    far = layer(0, scale=40.0).js_to(layer(1, scale=40.0), POSITIONS)
    assert far[1:].mean() > 0.3 and far.max() <= math.log(2) + 1e-12


def test_bfloat16_is_compared_in_float32() -> None:
    own, other = layer(0, dtype=torch.bfloat16), layer(1, dtype=torch.bfloat16)
    js = own.js_to(other, POSITIONS)
    js.sum().backward()
    assert js.dtype == torch.float32 and own.keys.grad.dtype == torch.bfloat16
    exact = dense(*(Attention(a.queries.double(), a.keys.double()) for a in (own, other)))
    torch.testing.assert_close(js.double(), exact, rtol=1e-4, atol=1e-6)


def test_no_queries_are_no_divergences() -> None:
    none = Positions(POSITIONS.queries[:0], POSITIONS.keys[:0], POSITIONS.valid[:0])
    assert layer(0).js_to(layer(1), none).shape == (0,)
