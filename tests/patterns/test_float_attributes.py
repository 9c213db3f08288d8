"""With dynamic=True Dynamo makes the floats of a module inputs of the graph: they are read, and another one is seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import llcompile
from tests.helpers import small

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Mixer(nn.Module):
    def __init__(self, mix: Callable[[float, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.mix, self.number = nn.Linear(8, 24), mix, 0.25

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.number, *self.qkv(x).chunk(3, -1))


def decay(number: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    passed = (-number * torch.ones(q.shape[1])).cumsum(0)
    return ((q @ k.mT) * (passed[:, None] - passed).exp()).tril() @ v


def power(number: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[1])
    return ((q @ k.mT) * number ** (i[:, None] - i).clamp(min=0)).tril() @ v


def scale(number: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * number).tril() @ v


def features(number: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * number).sigmoid() @ (k + number).sigmoid().mT).tril() @ v


def behind(number: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v * number


@pytest.mark.parametrize("mix", [decay, power, scale, features, behind])
def test_another_number_is_seen(mix: Callable[..., Tensor]) -> None:
    model = Mixer(mix)
    report = llcompile.convert(model, torch.randn(2, 20, 8))
    assert len(report.converted) == 1, str(report)
    run = torch.compile(model, backend="loglinear", dynamic=True, options={"inner": "eager"})
    for number, length in ((0.25, 20), (0.25, 33), (0.75, 33), (0.5, 12)):
        model.number = number
        x = torch.randn(2, length, 8)
        assert small.difference(run(x), model(x)) < 1e-5, (number, length)
    before = run(x).detach()
    for p in model.loglinear.parameters():  # type: ignore[union-attr]
        nn.init.normal_(p)
    assert (run(x) - before).abs().max() > 1e-3
