"""Level weights are a child of a module whose code may go over its children and parameters, or is run as `forward`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llcompile
from tests.helpers.small import difference, perturb

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
WIDTH = 16


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="loglinear", options={"inner": "eager"})


def data(length: int = 20) -> Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(1))


class Mixer(nn.Module):
    """`before` and `after` are what its code does around the mixing."""

    def __init__(self, before: Callable[..., Any] | None = None, after: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        if self.before is not None:
            assert self.before(self, x)
        out = (self.q(x) @ self.k(x).mT).tril() @ self.v(x)
        return out if self.after is None else self.after(self, out)


ASKED: dict[str, Callable[..., Any]] = {
    "devices": lambda m, x: all(p.device == x.device for p in m.parameters()),
    "dtypes": lambda m, x: {p.dtype for p in m.parameters()} == {torch.float32},
    "names": lambda m, x: dict(m.named_parameters()),
    "sizes": lambda m, x: sum(p.numel() for p in m.parameters()) > 0,
}


@pytest.mark.parametrize("what", ASKED)
def test_code_that_asks_about_its_parameters(what: str) -> None:
    model, x = Mixer(before=ASKED[what]), data()
    before = model(x)
    assert llcompile.convert(model, x).verified
    run = compiled(model)
    assert difference(run(x), before) < 1e-5
    perturb(model)
    assert difference(run(x), before) > 1e-3
    run(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


COUNTED: dict[str, Callable[..., Tensor]] = {
    "calls each child": lambda m, o: o + sum(child(o).mean() for child in m.children()),
    "counts children": lambda m, o: o / len(list(m.children())),
    "norm of parameters": lambda m, o: o + torch.stack([p.abs().mean() for p in m.parameters()]).mean(),
    "counts numbers": lambda m, o: o * sum(p.numel() for p in m.parameters()) ** -0.5,
    "the last child": lambda m, o: list(m.children())[-1](o),
}


class Layers(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[-1]((self[0](x) @ self[1](x).mT).tril() @ self[2](x))  # type: ignore[no-any-return]


class Three(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x) for layer in self)
        return (q @ k.mT).tril() @ v  # type: ignore[no-any-return]


MADE: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda after=after: Mixer(after=after)) for name, after in COUNTED.items()},
    "a sequence of layers": lambda: Layers(*(nn.Linear(WIDTH, WIDTH) for _ in range(4))),
    "a list of layers": lambda: Three([nn.Linear(WIDTH, WIDTH) for _ in range(3)]),
}


@pytest.mark.parametrize("what", MADE)
def test_code_that_level_weights_change_is_left_alone(what: str) -> None:
    """It gives what it gave, compiled and run eagerly, and the report says why it is not converted."""
    model, x = MADE[what](), data()
    own = copy.deepcopy(model)
    report = llcompile.convert(model, x)
    assert report.converted == ()
    assert {record.code for record in report.declined} <= {"output-changes", "rewrite-not-run"}
    assert len(report.declined) == 1
    for length in (20, 9):
        assert difference(compiled(model)(data(length)), own(data(length))) < 1e-6
        assert difference(model(data(length)), own(data(length))) < 1e-6


class Runs(nn.Module):
    """Runs a module as `forward`, so that Dynamo does not see it called."""

    def __init__(self, inner: nn.Module, by_class: bool) -> None:
        super().__init__()
        self.inner, self.by_class = inner, by_class

    def forward(self, x: Tensor) -> Tensor:
        out = type(self.inner).forward(self.inner, x) if self.by_class else self.inner.forward(x)
        assert isinstance(out, Tensor)
        return out


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_module_that_is_run_as_forward_has_its_own_level_weights(whole: bool, by_class: bool) -> None:
    """Converted alone or in what runs it, it acts in both."""
    inner, x = Mixer(), data()
    outer, before = Runs(inner, by_class), inner(x).detach()
    llcompile.convert(outer if whole else inner, x)
    assert [name for name, _ in outer.named_parameters() if "loglinear" in name] == [
        "inner.loglinear.weight",
        "inner.loglinear.bias",
    ]
    perturb(inner)
    alone, around = compiled(inner)(x), compiled(outer)(x)
    assert difference(alone, before) > 1e-3
    assert difference(around, alone) < 1e-6
    assert len([name for name, _ in outer.named_parameters() if "loglinear" in name]) == 2
