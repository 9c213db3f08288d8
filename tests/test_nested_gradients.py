"""torch.func.grad below torch.compile: a converted model in it acts, and has the gradients that autograd has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import llcompile
from tests.helpers.small import Model

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

IDS = torch.arange(20).reshape(2, 10)


class Sum(nn.Module):
    """Two products in a row on a residual stream, each with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = layer(x).chunk(3, -1)
            x = x + (q @ k.mT).tril() @ v / 8
        return x


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "a known function": (Model, IDS),
    "a part of the graph": (Sum, torch.randn(2, 10, 8)),
}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, backend="loglinear", options={"inner": "aot_eager"})


def converted(name: str) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    make, x = MODELS[name]
    model = make()
    llcompile.convert(model, x)
    for n, p in model.named_parameters():
        if ".loglinear" in f".{n}":
            nn.init.normal_(p)
    return model, x, {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_has_the_gradients_of_autograd(name: str) -> None:
    model, x, parameters = converted(name)
    compiled(model)(x).square().mean().backward()
    want = {n: p.grad for n, p in model.named_parameters()}
    assert all(g is not None and g.abs().max() > 0 for n, g in want.items() if ".loglinear" in f".{n}")
    torch._dynamo.reset()

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, p, (x,)).square().mean()

    got, value = compiled(torch.func.grad_and_value(loss))(parameters, x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(value, compiled(model)(x).square().mean(), rtol=1e-5, atol=0)


def test_a_gradient_of_a_gradient_is_refused_by_the_operator() -> None:
    model, x, parameters = converted("a part of the graph")

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, p, (x,)).square().mean()

    def length(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.grad(loss, argnums=1)(p, x).square().sum()

    with pytest.raises(Exception, match=r"second derivative|double backward|differentiat"):
        compiled(torch.func.grad(length))(parameters, x)
    # Torch writes both into the graph, and the error came between.
    assert torch._C._autograd._saved_tensors_hooks_is_enabled()
    assert torch._C._functorch.maybe_current_level() is None
