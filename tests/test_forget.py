"""What was compiled with a module before it got level weights is compiled again, however the frame held the module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llcompile
from llcompile.errors import LevelWeightsIgnoredWarning

pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), pytest.mark.filterwarnings("ignore")]


class Mixer(nn.Module):
    """Linear attention; with `breaks`, its graph breaks before the mixer."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        x = x.tanh()
        if self.breaks:
            torch._dynamo.graph_break()
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + (q @ k.mT).tril() @ v / 4


class Iterated(nn.Module):
    """Layers of a ModuleList, one after the other."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Mixer(breaks), Mixer(breaks)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Named(nn.Module):
    """Layers of a ModuleDict."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"a": Mixer(), "b": Mixer()})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


class Plain(nn.Module):
    """No mixer at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


def _itself(model: nn.Module, **given: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, **given)


def _closure(model: nn.Module, **given: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(lambda x: model(x) * 2, **given)


def _contained(model: nn.Module, **given: Any) -> Callable[[Tensor], Tensor]:
    def step(held: dict[str, list[nn.Module]], x: Tensor) -> Tensor:
        for one in held["models"]:
            x = one(x)
        return x

    run = torch.compile(step, **given)
    return lambda x: run({"models": [model]}, x)


def _in_place(model: nn.Module, **given: Any) -> Callable[[Tensor], Tensor]:
    model.compile(**given)
    return model


def _unguarded(name: str) -> Callable[..., Callable[[Tensor], Tensor]]:
    return lambda model, **given: torch.compile(
        model, **given, options={"guard_filter_fn": getattr(torch.compiler, name)}
    )


HELD: dict[str, tuple[Callable[[], nn.Module], Callable[..., Callable[[Tensor], Tensor]]]] = {
    "root": (Mixer, _itself),
    "ModuleList": (Iterated, _itself),
    "ModuleDict": (Named, _itself),
    "Sequential": (lambda: nn.Sequential(Iterated(), Mixer()), _itself),
    "closure": (Iterated, _closure),
    "containers": (Named, _contained),
    "in place": (Iterated, _in_place),
    "graph break": (lambda: Mixer(True), _itself),
    "graph breaks below": (lambda: Iterated(True), _closure),
    "no guards": (Iterated, _unguarded("skip_all_guards_unsafe")),
    "no guards on modules": (Iterated, _unguarded("skip_guard_on_all_nn_modules_unsafe")),
    "guards on tensors": (Iterated, _unguarded("keep_tensor_guards_unsafe")),
}


@pytest.fixture
def made() -> Iterator[list[int]]:
    """One entry for each graph that `_count` was given."""
    _made.clear()
    yield _made
    _made.clear()


_made: list[int] = []


def _count(module: Any, inputs: Any) -> Any:
    _made.append(1)
    return module.forward


def _perturb(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "loglinear" in name:
                parameter.normal_()


@pytest.mark.parametrize("how", HELD)
def test_another_backends_code_is_compiled_again(how: str, made: list[int]) -> None:
    make, compiled = HELD[how]
    model, x = make(), torch.randn(2, 12, 8)
    run = compiled(model, backend=_count)
    beside = torch.compile(Plain(), backend=_count)
    run(x)
    beside(x)
    run(x)
    before = len(made)
    assert llcompile.convert(model, x).converted
    assert len(made) == before
    _perturb(model)
    with pytest.warns(LevelWeightsIgnoredWarning):
        run(x)
    again = len(made)
    assert again > before
    run(x)
    beside(x)  # control: neither compiled code that is new, nor that of a model without mixers
    assert len(made) == again


def test_none_is_compiled_again_and_says_so() -> None:
    """Our own backend without level weights, for a model below a function."""
    model, x = Named(), torch.randn(2, 12, 8)
    run = _closure(model, backend="loglinear", options={"inner": "eager", "level_weights": "none"})
    before = run(x).detach()
    llcompile.convert(model, x)
    _perturb(model)
    with pytest.warns(LevelWeightsIgnoredWarning, match="switches them off"):
        assert torch.allclose(run(x), before, atol=1e-5)


def test_after_weights_that_the_first_call_attached() -> None:
    """Another backend's code, compiled before, says from then on that it ignores them."""
    model = nn.Sequential(Mixer())
    x = torch.randn(2, 12, 8)
    other = torch.compile(model, backend="eager")
    want = other(x)
    run = torch.compile(model, backend="loglinear", options={"inner": "eager"})
    run(x)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "loglinear" in name:
                parameter.add_(0.5)
        assert float((run(x) - want).abs().max()) > 1e-3  # the control: they act
        with pytest.warns(LevelWeightsIgnoredWarning, match="another backend"):
            assert torch.equal(other(x), want)
