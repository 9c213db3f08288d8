"""A converted model with level weights that are no longer 1, its output, and one step of an optimizer on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import llcompile

IDS = torch.arange(24).reshape(2, 12)


def levels(model: nn.Module) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if ".loglinear" in name]


def compiled(model: nn.Module) -> Tensor:
    return torch.compile(model, backend="loglinear", options={"inner": "eager"})(IDS)  # type: ignore[no-any-return]


def converted(model: nn.Module) -> nn.Module:
    llcompile.convert(model, IDS, verify=False)
    for p in levels(model):
        nn.init.normal_(p)
    return model


def step(model: nn.Module, parameters: Any = None) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters() if parameters is None else parameters, 1e-2)
    model(IDS).square().mean().backward()
    optimizer.step()
    return optimizer
