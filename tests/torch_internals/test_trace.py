"""Dynamo's private interfaces, one test for each thing that llcompile/torch_internals relies on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from llcompile.torch_internals import reach
from llcompile.torch_internals.backends import tracing_backend
from llcompile.torch_internals.inputs import graph_inputs, tracing_fake_mode
from llcompile.torch_internals.places import module_of
from llcompile.torch_internals.substitution import substitute, unsubstituted
from llcompile.torch_internals.trace import restart_trace


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.unread = nn.Parameter(torch.full((3,), 5.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Inner(), Inner()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def adding_unread(graph_module: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
    """A backend that adds the parameter `unread` of each module that multiplied to the product's result."""
    with tracing_fake_mode(graph_module.graph):
        for node in [n for n in graph_module.graph.nodes if getattr(n.target, "__name__", "") == "mul"]:
            owner = reach.find_module(module_of(node.meta)[0])
            assert isinstance(owner, Inner)
            added = reach.add_tensor_input(graph_module.graph, owner, ("unread",))
            with graph_module.graph.inserting_after(node):
                total = graph_module.graph.call_function(torch.add, (node, added))
            node.replace_all_uses_with(total, delete_user_cb=lambda user, total=total: user is not total)
    graph_module.recompile()
    inputs = graph_inputs(graph_module.graph)
    assert len(inputs) == len(graph_module.graph.find_nodes(op="placeholder"))
    return torch._dynamo.lookup_backend("aot_eager")(graph_module, inputs)


def expected(model: Outer, x: torch.Tensor) -> torch.Tensor:
    for layer in model.layers:
        x = x * layer.weight + layer.unread
    return x


@pytest.mark.usefixtures("fresh_dynamo")
class TestAddedInput:
    """A tensor that the traced code never read becomes an input that Dynamo fills on each call."""

    def test_value_and_gradient(self) -> None:
        model, x = Outer(), torch.randn(4, 3)
        compiled = torch.compile(model, backend=adding_unread)
        torch.testing.assert_close(compiled(x), expected(model, x))
        compiled(x).sum().backward()
        gradients = [layer.unread.grad for layer in model.layers]
        model.zero_grad(set_to_none=True)
        expected(model, x).sum().backward()
        for ours, layer in zip(gradients, model.layers, strict=True):
            torch.testing.assert_close(ours, layer.unread.grad)

    def test_replaced_parameters_are_seen(self) -> None:
        model, x = Outer(), torch.randn(4, 3)
        compiled = torch.compile(model, backend=adding_unread)
        compiled(x)
        state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        torch.testing.assert_close(compiled(x), expected(model, x))
        model.layers[1].unread = nn.Parameter(torch.randn(3))
        torch.testing.assert_close(compiled(x), expected(model, x))

    def test_layers_compiled_one_by_one(self) -> None:
        model, x = Outer(), torch.randn(4, 3)
        with torch.no_grad():
            model.layers[1].unread.fill_(-2.0)
        want = expected(model, x)
        for layer in model.layers:
            layer.compile(backend=adding_unread)
        torch.testing.assert_close(model(x), want)

    def test_function_over_a_model(self) -> None:
        model, x = Outer(), torch.randn(4, 3)

        @torch.compile(backend=adding_unread)
        def step(x: torch.Tensor) -> torch.Tensor:
            return model(x) + 2

        torch.testing.assert_close(step(x), expected(model, x) + 2)


@pytest.mark.usefixtures("fresh_dynamo")
def test_restart_traces_again() -> None:
    seen: list[int] = []

    def backend(graph_module: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        seen.append(len(graph_module.graph.nodes))
        if len(seen) == 1:
            model.layers[0].register_forward_hook(lambda module, args, output: output + 1)
            restart_trace("the test changed a module")
        return graph_module.forward

    model, x = Outer(), torch.randn(4, 3)
    result = torch.compile(model, backend=backend)(x)
    assert len(seen) == 2
    torch.testing.assert_close(result, (x * model.layers[0].weight + 1) * model.layers[1].weight)


@pytest.mark.usefixtures("fresh_dynamo")
def test_substitution_is_for_the_trace_only() -> None:
    def square(x: torch.Tensor) -> torch.Tensor:
        return x * x

    def cube(x: torch.Tensor) -> torch.Tensor:
        return x * x * x

    original = unsubstituted(square)  # type: ignore[arg-type]
    substitute(square, cube)
    x = torch.tensor([2.0])
    assert torch.compile(lambda x: square(x), backend="eager", fullgraph=True)(x).item() == 8.0
    assert torch.compile(lambda x: original(x), backend="eager", fullgraph=True)(x).item() == 4.0
    assert square(x).item() == 4.0


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_backend_of_a_trace_is_known() -> None:
    asked: list[Any] = []

    @torch._dynamo.assume_constant_result
    def ask() -> int:
        asked.append(tracing_backend())
        return 1

    def backend(graph_module: fx.GraphModule, inputs: list[Any], options: Any = None) -> Callable[..., Any]:
        return graph_module.forward

    torch.compile(lambda x: x + ask(), backend=backend, options={"a": 1})(torch.ones(2))
    function, keywords = asked[0]
    assert function is backend
    assert keywords == {"options": {"a": 1}}
    assert tracing_backend() == (None, {})
