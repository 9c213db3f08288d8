"""A layer whose mixing is a function, and whether a conversion leaves its outputs and gradients as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import llcompile
from tests.helpers import small
from tests.helpers.small import difference

WIDTH = 12
Function = Callable[..., Tensor]


class Written(nn.Module):
    """Projections, then `function(layer, x, q, k, v)` with all of [B, T, WIDTH]."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gate = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x, self.query(x), self.key(x), self.value(x))


def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention, the plain spelling."""
    return torch.tril(q @ k.transpose(-1, -2)) @ v


def example(length: int = 19) -> Tensor:
    """[2, T, WIDTH]."""
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(4))


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="loglinear", options={"inner": "eager"})


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """Of the model's own parameters, of a fixed function of its output."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output.dtype)
    named = {name: p for name, p in model.named_parameters() if "loglinear" not in name}
    found = torch.autograd.grad((output * weights).sum(), list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def same(
    function: Function, tolerance: float = 1e-5, grads: bool = True, length: int = 19
) -> tuple[llcompile.Report, Written]:
    """Converts a layer, and compares output and gradients with those of the unconverted one; its report and itself."""
    model = Written(function)
    return agreeing(model, tolerance, grads, length), model


def agreeing(model: nn.Module, tolerance: float = 1e-5, grads: bool = True, length: int = 19) -> llcompile.Report:
    """Converts a model, and compares output and gradients with those of the unconverted one; the report."""
    control, x = copy.deepcopy(model), example(length)
    with torch.set_grad_enabled(grads):
        want = control(x.clone())
        report = llcompile.convert(model, x.clone(), verify=False)
        got = compiled(model)(x.clone())
        assert got.dtype == want.dtype
        assert difference(got, want) < tolerance
        expected = gradients(control, want) if grads else {}
        for name, grad in (gradients(model, got) if grads else {}).items():
            largest = max(1.0, float(expected[name].abs().max()))
            assert float((grad - expected[name]).abs().max()) < tolerance * largest, name
    return report


def moves(model: nn.Module, grads: bool = True, length: int = 19) -> float:
    """By how much noise on the level weights moves the output."""
    x, run = example(length), compiled(model)
    with torch.set_grad_enabled(grads):
        before = run(x).detach().clone()
        small.perturb(model)
        return difference(run(x), before)
