"""What is done while compiling in the middle of a call is not seen by hooks on saved tensors around it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import llcompile
from tests.helpers import small

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Layer(nn.Module):
    """Linear attention."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.Linear(12, 36)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.all(x).chunk(3, -1)
        return x + (q @ k.mT).tril() @ v


def test_a_layer_that_is_compiled_below_a_checkpoint() -> None:
    """A checkpoint counts what its forward saves; of a second forward it expects as much."""
    layer, x = Layer(), torch.randn(2, 18, 12)
    control = copy.deepcopy(layer)
    assert llcompile.convert(layer, x).converted
    run = torch.compile(layer.forward, backend="loglinear", options={"inner": "eager"})
    for function in (run, control):
        checkpoint(function, x, use_reentrant=False).square().sum().backward()
    (first, *_), (second, *_) = (m.all.parameters() for m in (layer, control))
    assert first.grad is not None
    assert second.grad is not None
    assert small.difference(first.grad, second.grad) < 1e-4
