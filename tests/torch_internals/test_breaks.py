"""Graph breaks: what ended a graph, and why a call makes none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llcompile.torch_internals.breaks import graph_break, why_no_graph
from llcompile.torch_internals.trace import leave_out
from tests.helpers.traces import ask_of_graphs

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def line_of(function: Any, offset: int) -> str:
    code = function.__code__
    return f"{__file__}:{code.co_firstlineno + offset} in {function.__name__}"


def broken_twice(x: Tensor) -> Tensor:
    x = x + 1
    torch._dynamo.graph_break()
    x = x + 2
    torch._dynamo.graph_break()
    return x + 3


def branching(x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x + 1
    return x - 1


def whole(x: Tensor) -> Tensor:
    return x + 1


class TestGraphBreak:
    def test_a_reason_and_a_line_for_each_graph(self) -> None:
        first, second, last = ask_of_graphs(lambda _: graph_break(), broken_twice, torch.ones(2))
        assert first is not None
        assert "graph_break" in first[0]
        assert "\n" not in first[0]
        assert first[1] == line_of(broken_twice, 2)
        assert second is not None
        assert second[1] == line_of(broken_twice, 4)  # not the name that Dynamo gives what follows a break
        assert last is None

    def test_a_branch_on_values(self) -> None:
        first, last = ask_of_graphs(lambda _: graph_break(), branching, torch.ones(2))
        assert first == ("it branches on the values of a tensor", line_of(branching, 1))
        assert last is None

    def test_none(self) -> None:
        assert ask_of_graphs(lambda _: graph_break(), whole, torch.ones(2)) == [None]
        assert graph_break() is None


class TestWhyNoGraph:
    def test_a_break(self) -> None:
        found = why_no_graph(broken_twice, (torch.ones(2),), {})
        assert found is not None
        assert "graph_break" in found[0]
        assert found[1] == line_of(broken_twice, 2)

    def test_a_frame_that_dynamo_leaves_to_python(self) -> None:
        def left(x: Tensor) -> Tensor:
            return x + 1

        leave_out(left)
        reason, where = why_no_graph(left, (torch.ones(2),), {}) or ("", "")
        assert reason.startswith("Dynamo does not compile any of it")
        assert where == ""

    def test_nothing_to_make_a_graph_of(self) -> None:
        assert why_no_graph(lambda x: x, (), {"x": 1}) is None

    def test_a_graph(self) -> None:
        assert why_no_graph(whole, (torch.ones(2),), {}) is None
