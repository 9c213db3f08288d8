"""A model with one hand-written mixer, and whether its level weights act."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import llcompile

EAGER = {"inner": "eager"}


class Mixer(nn.Module):
    """Textbook linear attention."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.mT).tril() @ v


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = Mixer()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(x)


def inputs() -> Tensor:
    return torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(1))


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@torch.no_grad()
def perturb(weights: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in weights:
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "loglinear" in name]


def converted(kind: type[nn.Module] = Block) -> nn.Module:
    torch.manual_seed(0)
    model = kind()
    assert len(llcompile.convert(model, inputs(), verify=False).converted) == 1
    return model


def compiled(function: Any, **options: Any) -> Any:
    return torch.compile(function, backend="loglinear", options={**EAGER, **options})


def assert_acts(model: nn.Module, run: Callable[[Tensor], Tensor]) -> None:
    """Noise on the level weights moves the output, away from where the unconverted model stays; they have gradients."""
    x = inputs()
    with torch.no_grad():
        linear = type(model).forward(model, x)  # no hooks: the control
        assert difference(run(x), linear) < 1e-5
    perturb(weights_of(model))
    after = run(x)
    assert difference(after, linear) > 1e-3
    after.square().mean().backward()
    assert weights_of(model)
    assert all(p.grad is not None and p.grad.any() for p in weights_of(model))


def anything(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call
