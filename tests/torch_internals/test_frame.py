"""What Dynamo is tracing, and the modules that the traced frame holds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.symbolic_convert import InstructionTranslator

from llcompile.torch_internals.frame import (
    current_output,
    current_translator,
    kept_for_the_trace,
    modules_of_frame,
    outermost_frame,
)
from tests.helpers.traces import Scale, ask_of_graphs, asked_while_traced

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_current_translator_and_output() -> None:
    both = lambda *_: (current_translator(), current_output())  # noqa: E731
    ask, answers = asked_while_traced(both)
    (at_the_end,) = ask_of_graphs(both, lambda x: x + ask(), torch.ones(3))
    for translator, output in (*answers, at_the_end):
        assert isinstance(translator, InstructionTranslator)
        assert isinstance(output, OutputGraph)
    assert (current_translator(), current_output()) == (None, None)


def test_outermost_frame() -> None:
    """Not that of a function that is traced inside."""
    ask, answers = asked_while_traced(lambda: outermost_frame().f_code.co_name)

    def inside(x: torch.Tensor) -> torch.Tensor:
        return x + ask()

    def outside(x: torch.Tensor) -> torch.Tensor:
        return inside(x)

    assert ask_of_graphs(lambda _: outermost_frame().f_code.co_name, outside, torch.ones(3)) == ["outside"]
    assert answers == ["outside"]
    assert outermost_frame() is None


def test_kept_for_the_trace() -> None:
    count = 0

    @kept_for_the_trace
    def counted() -> int:
        nonlocal count
        count += 1
        return count

    for expected in (1, 2):
        torch._dynamo.reset()
        assert ask_of_graphs(lambda _: (counted(), counted()), lambda x: x + 1, torch.ones(3)) == [(expected, expected)]
    assert (counted(), counted()) == (3, 4)


def test_modules_of_frame() -> None:
    """In an argument, a container and a cell; not those that only other objects hold."""
    free, hidden = Scale(), SimpleNamespace(module=Scale())

    def function(x: torch.Tensor, given: nn.Module, several: list[nn.Module]) -> torch.Tensor:
        return free(given(several[0](x))) + len(vars(hidden))

    given, several = Scale(), [Scale()]
    (found,) = ask_of_graphs(lambda _: modules_of_frame(), function, torch.ones(3), given, several)
    assert {id(module) for _, module in found} == {id(module) for module in (free, given, *several)}
    assert modules_of_frame() == []
