"""The inputs of a graph and the objects that they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from llcompile.torch_internals.inputs import (
    fake_mode_of,
    graph_inputs,
    hold_tensor,
    input_name,
    input_value,
    is_handed_in_twice,
    is_number,
    is_parameter,
    module_tensors,
    tracing_fake_mode,
)
from llcompile.torch_internals.trace import below_export, traced_once
from tests.helpers.traces import Asking, Layers, Scale, ask_of_graphs, node_of

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return module.graph.find_nodes(op="placeholder")


def loose_graph() -> fx.Graph:
    """A graph of which Dynamo knows nothing."""
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    return graph


def test_fake_mode_of() -> None:
    def question(module: fx.GraphModule) -> Any:
        values = [node.meta["example_value"] for node in module.graph.nodes if "example_value" in node.meta]
        return fake_mode_of(module.graph), {value.fake_mode for value in values}

    ((mode, modes),) = ask_of_graphs(question, lambda x: x + 1, torch.ones(2))
    assert isinstance(mode, FakeTensorMode)
    assert modes == {mode}
    assert fake_mode_of(loose_graph()) is None


def test_tracing_fake_mode() -> None:
    def question(module: fx.GraphModule) -> Any:
        context = torch._guards.TracingContext.get()
        before = context.fake_mode
        with tracing_fake_mode(module.graph):
            inside = context.fake_mode
        with tracing_fake_mode(loose_graph()):
            assert context.fake_mode is before
        return inside is fake_mode_of(module.graph), context.fake_mode is before

    assert ask_of_graphs(question, lambda x: x + 1, torch.ones(2)) == [(True, True)]
    with tracing_fake_mode(loose_graph()):
        assert torch._guards.TracingContext.try_get() is None


@pytest.mark.filterwarnings("error:Attempted to insert a get_attr Node")
def test_hold_tensor() -> None:
    held, results = torch.full((2,), 5.0), []

    def question(module: fx.GraphModule) -> Any:
        nodes = [hold_tensor(module, ("a", "weight"), held) for _ in range(2)]
        add = node_of(module, "add")
        add.args = (add.args[0], nodes[1])
        module.recompile()
        results.extend(module(torch.ones(2)))
        return [
            (node.op, node.target, node.meta["held_as"], node.meta["example_value"].fake_mode) for node in nodes
        ], fake_mode_of(module.graph)

    (((first, second), mode),) = ask_of_graphs(question, lambda x: x + 1, torch.ones(2))
    assert first == ("get_attr", "a_weight", "a.weight", mode)
    assert second == ("get_attr", "a_weight_", "a.weight", mode)
    assert results[0].tolist() == [6, 6]


def test_graph_inputs() -> None:
    model, x = Scale(), torch.ones(3)
    (found,) = ask_of_graphs(lambda module: graph_inputs(module.graph), model, x)
    assert sorted(map(id, found)) == sorted([id(x), id(model.weight)])


def test_input_value() -> None:
    model, x = Layers(), torch.ones(3)
    (found,) = ask_of_graphs(lambda module: [input_value(node) for node in placeholders(module)], model, x)
    assert {id(value) for value in found} == {id(x), *(id(layer.weight) for layer in model.layers)}
    (loose,) = loose_graph().find_nodes(op="placeholder")
    assert input_value(loose) is None
    loose.meta["stands_for"] = x
    assert input_value(loose) is x


def test_input_value_after_the_compilation() -> None:
    """Dynamo lets go of what was handed in, but not of parameters."""
    nodes: list[fx.Node] = []
    torch.compile(lambda x: x + 1, backend=lambda module, _, **__: nodes.extend(placeholders(module)) or module)(
        torch.ones(2)
    )
    assert input_value(nodes[0]) is None


def test_input_value_below_export() -> None:
    """torch.export puts fake tensors into a model; what is answered are the program's own."""
    found: list[Any] = []

    class Exported(Scale):
        def forward(self, x: Tensor) -> Tensor:
            with below_export() as record:

                def backend(module: fx.GraphModule, inputs: list[Any]) -> Any:
                    values = [node.meta["grapharg"].example for node in placeholders(module)]
                    found.append((values, list(map(input_value, placeholders(module)))))
                    return record(module, inputs)

                return traced_once(lambda x: x * self.weight, backend)(x)

    exported = Exported()
    torch.export.export(exported, (torch.ones(3),))
    ((values, answers),) = found
    assert not any(value is exported.weight for value in values)
    assert any(value is exported.weight for value in answers)


def test_input_name() -> None:
    model = Layers()

    def function(net: nn.Module, x: Tensor) -> Tensor:
        return net(x)

    def question(module: fx.GraphModule) -> Any:
        return sorted(map(input_name, placeholders(module)))

    (names,) = ask_of_graphs(question, function, model, torch.ones(3))
    assert names == [
        "L['net']._modules['layers']._modules['0']._parameters['weight']",
        "L['net']._modules['layers']._modules['1']._parameters['weight']",
        "L['x']",
    ]
    assert input_name(next(iter(loose_graph().nodes))) == ""


def test_is_handed_in_twice() -> None:
    def question(module: fx.GraphModule) -> Any:
        return [is_handed_in_twice(node) for node in placeholders(module)]

    def function(x: Tensor, y: Tensor) -> Tensor:
        return x * 2 + y

    x = torch.ones(2)
    assert ask_of_graphs(question, function, x, x) == [[True]]
    torch._dynamo.reset()
    assert ask_of_graphs(question, function, x, x.clone()) == [[False, False]]
    assert not is_handed_in_twice(next(iter(loose_graph().nodes)))


def test_is_parameter() -> None:
    model, x, other = Layers(), torch.ones(3), torch.ones(3)

    def question(module: fx.GraphModule) -> Any:
        return {id(value): is_parameter(value) for value in map(input_value, placeholders(module))}

    (own,) = ask_of_graphs(question, model, x)
    assert own == {id(x): False, **{id(layer.weight): True for layer in model.layers}}

    asking = Asking(question)
    model.compile(backend=asking)
    functional_call(model, {"layers.0.weight": other}, (x,))
    assert asking.answers == [{id(x): False, id(other): True, id(model.layers[1].weight): True}]
    assert is_parameter(model.layers[0].weight)
    assert not is_parameter(other)  # without a trace, nothing says that it stands in for one
    assert not is_parameter(None)


def test_module_tensors() -> None:
    model, x = Layers(), torch.ones(3)
    (found,) = ask_of_graphs(lambda _: module_tensors(), model, x)
    held = {id(tensor) for layer in model.layers for tensor in (layer.table, layer.constant)}
    assert held <= found
    assert found.isdisjoint({id(x), *map(id, model.parameters())})
    assert module_tensors() == frozenset()


def test_an_owners_input_is_none_of_its_tensors() -> None:
    model, x = Scale(), torch.ones(3)
    model.owner_input = x
    (found,) = ask_of_graphs(lambda _: module_tensors(), model, x)
    assert id(x) not in found
    assert id(model.table) in found


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = 0.5
        self.register_buffer("shift", torch.tensor(2.0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * self.factor + self.shift + y


@pytest.mark.parametrize("dynamic", [True, False])
def test_is_number(dynamic: bool) -> None:
    found: list[set[str]] = []

    def backend(module: fx.GraphModule, _: list[Any]) -> Any:
        found.append({input_name(node) for node in placeholders(module) if is_number(node)})
        return module.forward

    torch.compile(Scaled(), backend=backend, dynamic=dynamic)(torch.ones(3, 4), torch.tensor(1.5))
    assert found == [{"L['self'].factor"} if dynamic else set()]
    assert not any(map(is_number, loose_graph().nodes))
