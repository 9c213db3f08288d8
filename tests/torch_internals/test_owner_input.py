"""What a module was called with, seen from the compilation of a part of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llcompile.torch_internals.owner_input import ModuleCall, call_under_way
from tests.helpers.traces import Scale, ask_of_graphs

sequence, mask, other = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool), torch.randn(2, 5, 4)


class TestCall:
    def test_holds(self) -> None:
        call = ModuleCall((sequence, 1), {"mask": mask})
        assert call.holds(sequence)
        assert call.holds(mask)
        assert not call.holds(sequence.clone())

    def test_sequence(self) -> None:
        assert ModuleCall((mask, "x"), {"x": sequence}).sequence(2, 5) is sequence
        assert ModuleCall((sequence, sequence), {}).sequence(2, 5) is sequence
        assert ModuleCall((sequence,), {}).sequence(2, 6) is None
        assert ModuleCall((sequence, other), {}).sequence(2, 5) is None
        assert ModuleCall((mask.unsqueeze(-1),), {}).sequence(2, 5) is None

    def test_of_width(self) -> None:
        call = ModuleCall((sequence, other), {"mask": mask})
        assert call.of_width(8) is sequence
        assert call.of_width(4) is other
        assert call.of_width(5) is None
        assert ModuleCall((other, other.clone()), {}).of_width(4) is None


class Broken(Scale):
    """Its projection is in another graph than its mixing, which holds `x` no more."""

    def forward(self, x: Tensor, factor: float = 1.0, **given: Tensor) -> Tensor:
        y = x * self.weight * factor
        torch._dynamo.graph_break()
        return y + 1


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = Broken()

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.inside(x + 1, 2.0, more=x)


@pytest.mark.usefixtures("fresh_dynamo")
def test_call_under_way() -> None:
    model, x = Outer(), torch.ones(2, 3)

    def question(_: Any) -> Any:
        return call_under_way(model), call_under_way(model.inside), call_under_way(model.inside.__class__())

    answers = ask_of_graphs(question, model, x)
    outer, inner, nobody = answers[-1]
    assert outer.holds(x)
    assert inner.args[1] == 2.0
    assert torch.equal(inner.args[0], x + 1)
    assert set(inner.kwargs) == {"more"}
    assert inner.holds(x)
    assert nobody is None
    assert call_under_way(model) is None
