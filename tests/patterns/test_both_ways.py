"""Linear mixers that look in both directions are left untouched, and named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import llcompile
from tests.helpers.small import difference

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

NAME = "bidirectional linear attention"
Mixing = Callable[["Layer", Tensor, Tensor, Tensor], Tensor]


class Layer(nn.Module):
    def __init__(self, mixing: Mixing) -> None:
        super().__init__()
        self.mixing = mixing
        self.qkv, self.again, self.out = nn.Linear(16, 48), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mixing(self, *self.qkv(x).chunk(3, -1)))


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v


def all_tokens(m: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.exp() @ (k.exp().mT @ v)


def normalised(m: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.exp(), k.exp()
    return q @ (k.mT @ v) / (q @ k.sum(1)[..., None])


def lower_and_upper(m: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(q, k, v) + (q @ k.mT).triu(1) @ v


def flipped(m: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    back = causal(q.flip(1), k.flip(1), v.flip(1)).flip(1)
    return torch.cat([causal(q, k, v), back], -1) @ m.again.weight.new_ones(32, 16)


@pytest.mark.parametrize("mixing", [all_tokens, normalised, lower_and_upper, flipped])
def test_both_directions(mixing: Mixing) -> None:
    """Converting one half would leave the other as it is."""
    torch.manual_seed(0)
    model, x = Layer(mixing), torch.randn(2, 20, 16)
    before = model(x)
    report = llcompile.convert(model, x, options={"strict": True})
    assert report.converted == report.declined == ()
    assert [(u.module, u.kind) for u in report.untouched] == [("", NAME)]
    assert "test_both_ways.py:" in report.untouched[0].where
    compiled = torch.compile(model, backend="loglinear", options={"inner": "eager"})
    assert difference(compiled(x), before) < 1e-6


def two_causal(m: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(q, k, v) + causal(k, q, v)


def encoder_and_decoder(m: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(*m.again(m.out(all_tokens(m, q, k, v))).chunk(3, -1))


@pytest.mark.parametrize(("mixing", "count"), [(two_causal, 2), (encoder_and_decoder, 1)])
def test_causal_ones_beside(mixing: Mixing, count: int) -> None:
    """Twins: two causal mixers are no pair of directions, nor is a causal one behind a bidirectional one."""
    report = llcompile.inspect(Layer(mixing), torch.randn(2, 20, 16))
    assert len(report.converted) == count


def one_ahead(m: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril(1) @ v


def test_a_mask_that_is_one_off_is_a_near_miss() -> None:
    """It sees the next token, and not all: likely a mistake, so it is declined with what was measured."""
    (declined,) = llcompile.inspect(Layer(one_ahead), torch.randn(2, 20, 16)).declined
    assert declined.code == "not-causal"
