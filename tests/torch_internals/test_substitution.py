"""A stand-in is traced where user code calls a function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llcompile.torch_internals.substitution import substitute, substitute_applied, unsubstituted


@pytest.mark.usefixtures("fresh_dynamo")
def test_substitution_is_for_the_trace_only() -> None:
    def square(x: Tensor) -> Tensor:
        return x * x

    def cube(x: Tensor) -> Tensor:
        return x * x * x

    original = unsubstituted(square)  # type: ignore[arg-type]
    substitute(square, cube)
    x = torch.tensor([2.0])
    assert torch.compile(lambda x: square(x), backend="eager", fullgraph=True)(x).item() == 8.0
    assert torch.compile(lambda x: original(x), backend="eager", fullgraph=True)(x).item() == 4.0
    assert square(x).item() == 4.0


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * slope


@pytest.mark.usefixtures("fresh_dynamo")
def test_substitution_of_what_an_autograd_function_applies() -> None:
    wanted = [True]
    substitute_applied(Square, lambda x: x * x * x, lambda: wanted[0])
    x, alias = torch.tensor([2.0], requires_grad=True), Square.apply

    def traced() -> float:
        torch._dynamo.reset()
        direct = torch.compile(lambda x: Square.apply(x), backend="eager", fullgraph=True)(x).item()
        assert torch.compile(lambda x: alias(x), backend="eager", fullgraph=True)(x).item() == direct
        return float(direct)

    assert traced() == 8.0
    wanted[0] = False
    assert traced() == 4.0
    assert Square.apply(x).item() == 4.0


def test_a_copy_is_the_same_function() -> None:
    offset = 3

    def function(x: int, by: int = 1, *, factor: int = 2) -> int:
        return factor * (x + by) + offset

    function.note = "of a test"  # type: ignore[attr-defined]
    copy = unsubstituted(function)  # type: ignore[arg-type]
    assert copy is not function
    assert copy(4) == function(4) == 13
    assert copy(4, 2, factor=1) == 9
    assert (copy.__name__, copy.__qualname__, copy.__module__) == ("function", function.__qualname__, __name__)
    assert copy.note == "of a test"  # type: ignore[attr-defined]
