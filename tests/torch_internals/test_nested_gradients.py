"""Nested gradients: what Dynamo writes into a graph for torch.func.grad."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from llcompile.torch_internals import nested_gradients
from tests.helpers.traces import ask_of_graphs

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def twice(x: Tensor, weight: Tensor) -> Tensor:
    def inner(y: Tensor, w: Tensor) -> Tensor:
        return torch.func.grad(lambda z: (z.sin() * y * w.cos()).sum())(y).sum()

    return torch.func.grad(inner)(x, weight)


def test_what_the_nodes_are_about() -> None:
    def question(module: fx.GraphModule) -> Any:
        def named(is_so: Any) -> list[str]:
            return [node.target.__name__ for node in module.graph.nodes if is_so(node)]

        both = [n for n in module.graph.nodes if nested_gradients.is_about(n) and nested_gradients.is_around(n)]
        return named(nested_gradients.is_about), named(nested_gradients.is_around), both

    ((about, around, both),) = ask_of_graphs(question, torch.func.grad(lambda x: x.sin().sum()), torch.ones(3))
    assert set(about) == {"_wrap_for_grad", "_set_tensor_requires_grad", "_autograd_grad", "_unwrap_for_grad"}
    assert set(around) == {
        "_saved_tensors_hooks_disable",
        "_grad_increment_nesting",
        "set_inplace_requires_grad_allowed",
        "_grad_decrement_nesting",
        "_saved_tensors_hooks_enable",
    }
    assert both == []
    assert ask_of_graphs(question, lambda x: x.sin().sum(), torch.ones(3)) == [([], [], [])]


def test_a_graph_is_what_it_was() -> None:
    """Two levels deep: what is read in one way inside is read itself in between, and all else as it was."""
    read: dict[str, list[str]] = {}

    def look(module: fx.GraphModule, inputs: list[Tensor]) -> Any:
        before = str(module.graph)
        wrappers = nested_gradients.unwrap(module.graph)
        for name in ("sin", "cos"):
            (node,) = module.graph.find_nodes(op="call_method", target=name)
            read[name] = [source.op for source in node.all_input_nodes]
        nested_gradients.wrap(module.graph, wrappers)
        assert str(module.graph) == before
        return module

    x, weight = torch.randn(2, 3)
    torch.testing.assert_close(torch.compile(twice, backend=look)(x, weight), twice(x, weight))
    assert read == {"sin": ["call_function"], "cos": ["placeholder"]}  # y is read as it is, too


def test_a_graph_without_gradients_is_left_alone() -> None:
    assert ask_of_graphs(lambda module: nested_gradients.unwrap(module.graph), torch.sin, torch.ones(3)) == [{}]
