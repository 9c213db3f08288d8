"""The small model with adapters, and the plain model that it must equal."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

import llcompile
from tests.helpers import small

IDS = small.ids()
EAGER = {"inner": "eager"}
RANK, ALPHA = 4, 8


@functools.cache
def _converted() -> nn.Module:
    model = small.model()
    assert len(llcompile.convert(model, IDS, verify=False).converted) == 2
    small.perturb(model)
    return model


def converted() -> Any:
    """A base model with level weights that are not 1; the same each time."""
    return copy.deepcopy(_converted())


def compiled(model: nn.Module) -> Any:
    """The model, compiled in place, with nothing left of earlier compilations."""
    torch._dynamo.reset()
    model.compile(backend="loglinear", options=EAGER)
    return model


def train(model: nn.Module, steps: int = 3) -> list[str]:
    """Trains all that may be; returns the names of level weights that had a gradient in the last step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    reached: list[str] = []
    for _ in range(steps):
        optimizer.zero_grad()
        small.loss(model(IDS), IDS).backward()
        levels = [(name, p.grad) for name, p in model.named_parameters() if "loglinear" in name]
        reached = [name for name, grad in levels if grad is not None and grad.abs().max() > 0]
        optimizer.step()
    optimizer.zero_grad()
    return reached


@torch.no_grad()
def output(model: Any) -> Tensor:
    """The logits of the tokens that all tests use."""
    logits: Tensor = model(IDS)
    return logits


@torch.no_grad()
def plain(model: nn.Module, adapter: str | None = "default") -> Any:
    """A converted model without adapters that has the sums and the copies which one of `model` stands for."""
    made = converted()
    layers = [m for name, m in model.named_modules() if name.rpartition(".")[0].endswith("layers")]
    assert len(layers) == len(made.layers)
    for layer, target in zip(layers, made.layers, strict=True):
        target.qkv.weight.copy_(_sum(layer.qkv, "weight", adapter))
        for name, tensor in target.loglinear.tensors():
            tensor.copy_(_level_tensor(layer.loglinear, name, adapter))
    return compiled(made)


def _level_tensor(child: Any, name: str, adapter: str | None) -> Tensor:
    if hasattr(child, "modules_to_save"):
        own = adapter in child.modules_to_save
        child = child.modules_to_save[adapter] if own else child.original_module
    return _sum(child, name, adapter)


def _sum(child: Any, name: str, adapter: str | None) -> Tensor:
    """A parameter and what LoRA adds to it."""
    if not hasattr(child, "base_layer"):
        return getattr(child, name)  # type: ignore[no-any-return]
    base = _sum(child.base_layer, name, adapter)
    if adapter not in child.lora_A or getattr(child, "parameter_name", name) != name:
        return base
    return base + ALPHA / RANK * child.lora_B[adapter].weight @ child.lora_A[adapter].weight  # type: ignore[no-any-return]


@torch.no_grad()
def moved_by_noise(model: nn.Module, *names: str) -> float:
    """How far the output moves when parameters are changed whose names have all of `names` in them."""
    chosen = [p for name, p in model.named_parameters() if all(part in name for part in names)]
    assert chosen, names
    before, kept = output(model), [p.clone() for p in chosen]
    generator = torch.Generator().manual_seed(3)
    for p in chosen:
        p.add_(torch.randn(p.shape, generator=generator))
    after = output(model)
    for p, value in zip(chosen, kept, strict=True):
        p.copy_(value)
    return small.difference(after, before)
