"""Level weights act however the compiled frame holds the model: by identity, and not by the names in the frame."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from tests.helpers.block import (
    EAGER,
    Block,
    Mixer,
    anything,
    assert_acts,
    compiled,
    converted,
    difference,
    inputs,
    perturb,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Pair(NamedTuple):
    name: str
    model: nn.Module


REGISTRY: dict[str, list[nn.Module]] = {"nets": []}


class Loop:
    """A training loop as people write them."""

    net: nn.Module

    def __init__(self, net: nn.Module) -> None:
        type(self).net = net
        self.slots = types.SimpleNamespace(inner={"a": (net,)})

    @classmethod
    def by_class(cls, x: Tensor) -> Tensor:
        return cls.net(x)

    def nested(self, x: Tensor) -> Tensor:
        return self.slots.inner["a"][0](x)

    def scaled(self, scale: float, x: Tensor) -> Tensor:
        return self.net(x) * scale

    plain = functools.partialmethod(scaled, 1.0)

    @property
    def current(self) -> nn.Module:
        return self.net

    def by_property(self, x: Tensor) -> Tensor:
        return self.current(x)


def in_registry(model: nn.Module) -> Any:
    REGISTRY["nets"] = [model]
    return compiled(lambda x: REGISTRY["nets"][-1](x))


def in_named_tuple(model: nn.Module) -> Any:
    pair, run = Pair("net", model), compiled(lambda pair, x: pair.model(x))
    return lambda x: run(pair, x)


def in_module_dict(model: nn.Module) -> Any:
    nets = nn.ModuleDict({"only": model})

    def step(x: Tensor) -> Tensor:
        for _, net in nets.items():
            x = net(x)
        return x

    return compiled(step)


def through_a_context(model: nn.Module) -> Any:
    @contextlib.contextmanager
    def lent() -> Iterator[nn.Module]:
        yield model

    def step(x: Tensor) -> Tensor:
        with lent() as net:
            return net(x)

    return compiled(step)


def in_a_default(model: nn.Module) -> Any:
    def step(x: Tensor, *, net: nn.Module = model) -> Tensor:
        return net(x)

    return compiled(step)


def lambda_as_forward(model: nn.Module) -> Any:
    forward = model.forward
    model.forward = lambda *given, **named: forward(*given, **named)
    return compiled(model)


def list_of_layers(model: nn.Module) -> Any:
    layers = [model]
    return compiled(lambda x: functools.reduce(lambda h, layer: layer(h), layers, x))


ROADS: dict[str, Callable[[nn.Module], Any]] = {
    "a dict of lists": in_registry,
    "a NamedTuple": in_named_tuple,
    "a classmethod": lambda m: compiled(Loop(m).by_class),
    "nested containers": lambda m: compiled(Loop(m).nested),
    "a partialmethod": lambda m: compiled(Loop(m).plain),
    "a property": lambda m: compiled(Loop(m).by_property),
    "items of a ModuleDict": in_module_dict,
    "a context manager": through_a_context,
    "a default argument": in_a_default,
    "forward set to a lambda": lambda_as_forward,
    "a plain list of layers": list_of_layers,
    "its __call__": lambda m: compiled(m.__call__),
    "a partial of its forward": lambda m: compiled(functools.partial(m.forward)),
    "inside checkpoint": lambda m: compiled(lambda x: checkpoint(m, x, use_reentrant=False)),
}


@pytest.mark.parametrize("road", ROADS)
def test_roads(road: str) -> None:
    model = converted()
    assert_acts(model, ROADS[road](model))


class Wrapped(Mixer):
    forward = anything(anything(Mixer.forward))


class Static(Mixer):
    """Its forward is found through a descriptor of its own."""

    forward = functools.partialmethod(Mixer.forward)


@pytest.mark.parametrize("kind", [Mixer, Wrapped, Static])
@pytest.mark.parametrize("how", ["compile", "module.compile", "forward", "its layers"])
def test_the_root_of_the_frame_owns_them(kind: type[nn.Module], how: str) -> None:
    """The compiled frame is the mixer's own forward, with no module around it and decorators before it."""
    model = converted(kind)
    if how == "module.compile":
        model.compile(backend="loglinear", options=EAGER)
    run = {"compile": lambda: compiled(model), "forward": lambda: compiled(model.forward)}.get(how, lambda: model)()
    if how == "its layers":
        outer = nn.Sequential(nn.Identity(), model)
        model.compile(backend="loglinear", options=EAGER)
        run = outer
    assert_acts(model, run)


def test_a_function_that_calls_forward_itself() -> None:
    """No module is called, so that neither hooks nor a module stack say whose the code is."""
    model = converted(Mixer)
    assert_acts(model, compiled(lambda x: model.forward(x * 1.0)))


@pytest.mark.parametrize("as_tensors", [False, True])
def test_the_tensors_of_a_functional_call(as_tensors: bool) -> None:
    """What counts is what is handed in."""
    model, x = converted(), inputs()
    own = {name: p.detach().clone() if as_tensors else p for name, p in model.named_parameters()}
    other = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, value in other.items():
        if "loglinear" in name:
            value.add_(0.3)
    run = compiled(lambda p, x: functional_call(model, p, (x,)))
    first, second = run(own, x), run(other, x)
    with torch.no_grad():
        linear = Block.forward(model, x)
        assert difference(first, linear) < 1e-5
        model.load_state_dict(other, strict=False)
        assert difference(second, compiled(model)(x)) < 1e-5
    assert difference(second, linear) > 1e-3


def test_a_parametrised_weight() -> None:
    """What a parametrisation makes of the parameter is what acts."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.zeros(()))

        def forward(self, weight: Tensor) -> Tensor:
            return weight + self.by

    model, x = converted(), inputs()
    run = compiled(model)
    before = run(x).detach()
    shift = Shifted()
    nn.utils.parametrize.register_parametrization(model.mixer.loglinear, "bias", shift)
    assert difference(run(x), before) < 1e-6
    with torch.no_grad():
        shift.by.fill_(0.5)
    after = run(x)
    assert difference(after, before) > 1e-3
    after.square().mean().backward()
    assert shift.by.grad is not None
    assert shift.by.grad.abs() > 0


def test_a_wrapper_that_holds_them() -> None:
    """A wrapper of some library in their place is called, and decides which it uses."""

    class Choosing(nn.Module):
        def __init__(self, first: nn.Module, second: nn.Module) -> None:
            super().__init__()
            self.first, self.second = first, second

        def forward(self, *args: Any) -> Any:
            return self.second(*args)

    model, x = converted(), inputs()
    held = model.mixer.loglinear
    other = type(held)(held.kind, held.heads, held.levels, held.in_features)
    model.mixer.loglinear = Choosing(held, other)
    run = compiled(model)
    before = run(x).detach()
    perturb(list(held.parameters()))
    assert difference(run(x), before) == 0
    perturb(list(other.parameters()))
    assert difference(run(x), before) > 1e-3
