"""Which tensors of a frame are captured."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from llcompile.torch_internals.captured import is_captured
from llcompile.torch_internals.inputs import input_value
from tests.helpers.traces import ask_of_graphs

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

GLOBAL = torch.tensor([1.0, 2.0])
DEEP = torch.ones(2, 3, 4)
TRAINED = torch.ones(2, requires_grad=True)


def times(factor: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x * factor


class Holding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.function, self.tables = times(torch.ones(2)), [torch.full((2,), 3.0)]

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.function(x) * scale * GLOBAL * self.tables[0] * TRAINED * DEEP.sum()


def captured(module: fx.GraphModule) -> list[list[float]]:
    nodes = [(node, input_value(node)) for node in module.graph.find_nodes(op="placeholder")]
    return [held.tolist() for node, held in nodes if is_captured(node, held)]


def test_captured() -> None:
    """A closure's, a global's and a list's; no argument, nothing that is trained, nothing of three axes."""
    ((found),) = ask_of_graphs(captured, Holding(), torch.randn(3, 2), torch.full((2,), 7.0))
    assert sorted(found) == [[1.0, 1.0], [1.0, 2.0], [3.0, 3.0]]


def test_a_captured_input_is_an_input() -> None:
    """A function that is given no tensor captures what it runs on."""
    x = torch.randn(3, 2)
    assert ask_of_graphs(captured, lambda: x * GLOBAL) == [[]]


def test_a_free_variable_is_captured() -> None:
    factor = torch.full((2,), 5.0)
    assert ask_of_graphs(captured, lambda x: x * factor, torch.randn(3, 2)) == [[[5.0, 5.0]]]
