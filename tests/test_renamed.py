"""A mixer keeps its level weights when its projections' parameters get other names: adapters, parametrisations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import llcompile
from tests.helpers.block import assert_acts, compiled, difference, inputs, perturb, weights_of

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Two(nn.Module):
    """Two mixers in one forward, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 24), nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.first(x).chunk(3, -1)
        x = x + torch.einsum("btd,bsd->bts", q, k).tril() @ v
        q, k, v = self.second(x).chunk(3, -1)
        return x + torch.einsum("btd,bsd->bts", q, k).tril() @ v


class Adapter(nn.Module):
    """A projection with a low-rank part beside it, as PEFT wraps one."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Parameter(torch.randn(2, base_layer.in_features) / 8)
        self.up = nn.Parameter(torch.zeros(base_layer.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + F.linear(F.linear(x, self.down), self.up)


def adapt(model: Two, name: str) -> None:
    setattr(model, name, Adapter(getattr(model, name)))


def normalise(model: Two, name: str) -> None:
    parametrizations.weight_norm(getattr(model, name))


@pytest.mark.parametrize("names", [("first",), ("second",), ("first", "second")])
@pytest.mark.parametrize("rename", [adapt, normalise])
def test_after_the_conversion(rename: Callable[[Two, str], None], names: tuple[str, ...]) -> None:
    """Each of two mixers keeps its own, and none gets new ones."""
    model = Two()
    llcompile.convert(model, inputs(), verify=False)
    before = [name for name, _ in model.named_parameters() if "loglinear" in name]
    with torch.no_grad():
        model.loglinear.bias.fill_(0.7)
        want = compiled(model)(inputs())
    torch._dynamo.reset()
    for name in names:
        rename(model, name)
    assert difference(compiled(model)(inputs()), want) < 1e-5
    assert [name for name, _ in model.named_parameters() if "loglinear" in name] == before
    assert difference(Two.forward(model, inputs()), want) > 1e-3  # the control: the level weights matter


def test_before_the_conversion() -> None:
    """Converted with adapters, and the adapters are taken away: the names are the plain ones again."""
    model = Two()
    adapt(model, "first")
    llcompile.convert(model, inputs(), verify=False)
    count = len(weights_of(model))
    model.first = model.first.base_layer
    assert_acts(model, compiled(model))
    assert len(weights_of(model)) == count


def test_another_mixer_on_the_same_line() -> None:
    """What runs in the place of another mixer, with parameters of its own, does not get that one's level weights."""

    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.last = (nn.Linear(8, 24) for _ in range(3))

        def forward(self, x: Tensor, other: bool = False) -> Tensor:
            for projection in (self.right, self.last) if other else (self.left, self.last):
                q, k, v = projection(x).chunk(3, -1)
                x = x + torch.einsum("btd,bsd->bts", q, k).tril() @ v
            return x

    model = Either()
    llcompile.convert(model, inputs(), verify=False)
    with torch.no_grad():
        want = compiled(model)(inputs(), other=True)
    torch._dynamo.reset()
    perturb(list(model.loglinear.parameters()))  # those of `left`, which does not run
    assert difference(compiled(model)(inputs(), other=True), want) < 1e-6
