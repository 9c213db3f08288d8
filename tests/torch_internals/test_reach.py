"""From the frame that Dynamo traces to the modules that run in it, and to their tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from llcompile.torch_internals import reach
from llcompile.torch_internals.inputs import graph_inputs, tracing_fake_mode
from llcompile.torch_internals.places import module_of
from tests.helpers.traces import Asking, Layers, Scale, ask_of_graphs, asked_while_traced

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Watched(Scale):
    """Has something asked in the middle of its forward."""

    def __init__(self, ask: Callable[[], int]) -> None:
        super().__init__()
        self.ask = ask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.ask()


def ask_in_forward(question: Callable[[], Any], around: Callable[[nn.Module], Any]) -> tuple[nn.Module, list[Any]]:
    """A module, and the answers in the middle of its forward, in a compiled call of what is made around it."""
    ask, answers = asked_while_traced(question)
    model = Watched(ask)
    torch.compile(around(model), backend="eager")(torch.ones(3))
    return model, answers


class TestInnermostModule:
    @pytest.mark.parametrize(
        "around",
        [lambda m: m, lambda m: nn.Sequential(nn.Identity(), m), lambda m: lambda x: m(x), lambda m: m.forward],
        ids=["itself", "a model", "a function", "its forward"],
    )
    def test_its_forward_is_traced(self, around: Callable[[nn.Module], Any]) -> None:
        model, answers = ask_in_forward(reach.innermost_module, around)
        assert answers == [model]

    def test_none(self) -> None:
        ask, answers = asked_while_traced(reach.innermost_module)
        torch.compile(lambda x: x + ask(), backend="eager")(torch.ones(3))
        assert answers == [None]
        assert reach.innermost_module() is None


class TestRootModule:
    def test_the_module_whose_call_is_compiled(self) -> None:
        model = Layers()
        assert ask_of_graphs(lambda _: reach.root_module(), model, torch.ones(3)) == [model]

    def test_the_module_whose_call_goes_on_behind_a_break(self) -> None:
        class Broken(Scale):
            def forward(self, x: Tensor) -> Tensor:
                x = x * self.weight
                torch._dynamo.graph_break()
                return x + self.table

        model = nn.Sequential(Broken(), Broken())
        answers = ask_of_graphs(lambda _: reach.root_module(), model, torch.ones(3))
        assert set(map(id, answers)) == set(map(id, model))

    def test_the_first_module_that_a_function_holds(self) -> None:
        first, second = Layers(), Layers()

        def function(x: Tensor) -> Tensor:
            return second(first(x))

        assert ask_of_graphs(lambda _: reach.root_module() in (first, second), function, torch.ones(3)) == [True]

    def test_none(self) -> None:
        assert ask_of_graphs(lambda _: reach.root_module(), lambda x: x + 1, torch.ones(3)) == [None]
        assert reach.root_module() is None


def test_running_module() -> None:
    answers: list[Any] = []

    class Looking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            answers.append(reach.running_module())
            return x

    inside = Looking()
    nn.Sequential(nn.Identity(), inside)(torch.ones(3))
    assert answers == [inside]
    assert reach.running_module() is None


def test_innermost_holding() -> None:
    model = Layers()
    parameter = model.layers[1].weight

    def question(called: list[nn.Module]) -> Callable[[Any], Any]:
        return lambda _: reach.innermost_holding(parameter, called)

    def function(net: nn.Module, x: Tensor) -> Tensor:
        return net.layers[1].forward(x)

    for called, want in (([], model.layers[1]), ([model.layers[1]], model.layers)):
        torch._dynamo.reset()
        assert ask_of_graphs(question(called), function, model, torch.ones(3)) == [want]
    torch._dynamo.reset()
    other = nn.Parameter(torch.ones(3))
    assert ask_of_graphs(lambda _: reach.innermost_holding(other, []), model, torch.ones(3)) == [None]
    assert reach.innermost_holding(parameter, []) is None


def test_is_call_of_a_module() -> None:
    model = Layers()
    assert ask_of_graphs(lambda _: reach.is_call_of_a_module(), model, torch.ones(3)) == [True]
    assert ask_of_graphs(lambda _: reach.is_call_of_a_module(), lambda x: model(x), torch.ones(3)) == [False]
    assert not reach.is_call_of_a_module()


def test_modules_asked() -> None:
    class Training(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight if self.training else x

    reads, reads_not = Training(), Scale()
    model = nn.Sequential(reads_not, reads)
    (asked,) = ask_of_graphs(lambda _: reach.modules_asked("training"), model, torch.ones(3))
    assert asked == [reads]
    torch._dynamo.reset()
    assert ask_of_graphs(lambda _: reach.modules_asked("no_such"), model, torch.ones(3)) == [[]]
    assert reach.modules_asked("training") == []


def test_modules_in() -> None:
    model = Layers()
    (found,) = ask_of_graphs(lambda module: reach.modules_in(module.graph), lambda x: model(x) + 1, torch.ones(3))
    assert [id(m) for m in found if isinstance(m, Scale)] == [id(layer) for layer in model.layers]
    assert id(model) in map(id, found)
    assert ask_of_graphs(lambda module: reach.modules_in(module.graph), lambda x: x + 1, torch.ones(3)) == [[]]


def test_exported_module() -> None:
    model = torch.export.export(Layers(), (torch.ones(3),)).module()

    def question(_: Any) -> Any:
        return reach.exported_module("layers.1"), reach.exported_module("no.such")

    assert ask_of_graphs(question, model, torch.ones(3)) == [(model.get_submodule("layers.1"), None)]
    assert ask_of_graphs(question, Layers(), torch.ones(3)) == [(None, None)]
    assert reach.exported_module("layers.1") is None


def test_find_module() -> None:
    model, other = Layers(), Layers()
    key = str(id(model.layers[1]))

    def question(_: Any) -> Any:
        return [reach.find_module(k) for k in (key, f"{key}@1", str(id(other)), "L__self__")]

    layer = model.layers[1]
    assert ask_of_graphs(question, model, torch.ones(3)) == [[layer, layer, None, None]]
    assert reach.find_module(key) is None


def test_path_of() -> None:
    model = Layers()

    def question(_: Any) -> Any:
        return reach.path_of(model.layers[1]), reach.path_of(model), reach.path_of(Scale())

    assert ask_of_graphs(question, model, torch.ones(3)) == [("layers.1", "", "")]
    assert reach.path_of(model.layers[1]) == ""


REGISTERED = Layers()
HOLDERS: dict[str, Callable[[nn.Module], tuple[Callable[..., Any], tuple[Any, ...]]]] = {
    "an argument": lambda m: (lambda net, x: net(x), (m, torch.ones(3))),
    "a closure": lambda m: (lambda x: m(x), (torch.ones(3),)),
    "a list": lambda m: (lambda nets, x: nets[0](x), ([m], torch.ones(3))),
    "a method": lambda m: (lambda call, x: call(x), (m.forward, torch.ones(3))),
    "a partial": lambda m: (lambda call, x: call(x), (functools.partial(m.forward), torch.ones(3))),
    "an attribute": lambda m: (lambda held, x: held.net(x), (type("Holder", (), {"net": m})(), torch.ones(3))),
    "a global": lambda m: (lambda x: REGISTERED(x), (torch.ones(3),)),
}


@pytest.mark.parametrize("how", HOLDERS)
def test_held_modules(how: str) -> None:
    model = REGISTERED if how == "a global" else Layers()
    function, args = HOLDERS[how](model)
    (found,) = ask_of_graphs(lambda _: set(map(id, reach.held_modules())), function, *args)
    assert {id(module) for module in model.modules()} <= found
    assert id(nn.Identity()) not in found
    assert reach.held_modules() == []


def test_is_touched() -> None:
    model = Layers()

    def ask(_: object) -> list[bool]:
        return [reach.is_touched(layer) for layer in model.layers]

    (found,) = ask_of_graphs(ask, lambda x: model.layers[0](x), torch.ones(3))
    assert found[0]
    assert not any(found[1:])
    assert not reach.is_touched(model.layers[0])


@pytest.mark.parametrize("guarded", [False, True])
def test_guard_modules(guarded: bool) -> None:
    """Without it, modules that are alike share what was compiled."""
    reach.guard_modules()  # no trace is under way
    backend = Asking(lambda _: reach.guard_modules() if guarded else None)
    run = torch.compile(lambda net, x: net(x), backend=backend)
    one, other = Scale(), Scale(2.0)
    for net in (one, other, one, other):
        assert run(net, torch.ones(3)).tolist() == net.weight.tolist()
    assert backend.count == 1 + guarded


def adding_unread(graph_module: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
    """A backend that adds the parameter `unread` of each module that multiplied to the product's result."""
    with tracing_fake_mode(graph_module.graph):
        for node in [n for n in graph_module.graph.nodes if getattr(n.target, "__name__", "") == "mul"]:
            owner = reach.find_module(module_of(node.meta)[0])
            assert isinstance(owner, Scale)
            added = reach.add_tensor_input(graph_module.graph, owner, ("unread",))
            with graph_module.graph.inserting_after(node):
                total = graph_module.graph.call_function(torch.add, (node, added))
            node.replace_all_uses_with(total, delete_user_cb=lambda user, total=total: user is not total)
    graph_module.recompile()
    inputs = graph_inputs(graph_module.graph)
    assert len(inputs) == len(graph_module.graph.find_nodes(op="placeholder"))
    return torch._dynamo.lookup_backend("aot_eager")(graph_module, inputs)


def expected(model: Layers, x: Tensor) -> Tensor:
    for layer in model.layers:
        x = x * layer.weight + layer.unread
    return x


class TestAddedInput:
    """A tensor that the traced code never read becomes an input that Dynamo fills on each call."""

    def test_a_tensor_that_was_asked_for_its_shape_alone(self) -> None:
        """Dynamo has wrapped it, and taken it out of the graph as unused."""
        model, x = Layers(), torch.randn(4, 3)

        def asks(x: Tensor) -> Tensor:
            assert all(p.shape == (3,) for p in model.parameters())
            return model(x)  # type: ignore[no-any-return]

        run = torch.compile(asks, backend=adding_unread)
        for _ in range(2):
            torch.testing.assert_close(run(x), expected(model, x))
            with torch.no_grad():
                model.layers[0].unread += 1
        run(x).sum().backward()
        assert model.layers[0].unread.grad is not None

    def test_value_and_gradient(self) -> None:
        model, x = Layers(), torch.randn(4, 3)
        compiled = torch.compile(model, backend=adding_unread)
        torch.testing.assert_close(compiled(x), expected(model, x))
        compiled(x).sum().backward()
        gradients = [layer.unread.grad for layer in model.layers]
        model.zero_grad(set_to_none=True)
        expected(model, x).sum().backward()
        for ours, layer in zip(gradients, model.layers, strict=True):
            torch.testing.assert_close(ours, layer.unread.grad)

    def test_replaced_parameters_are_seen(self) -> None:
        model, x = Layers(), torch.randn(4, 3)
        compiled = torch.compile(model, backend=adding_unread)
        compiled(x)
        state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        torch.testing.assert_close(compiled(x), expected(model, x))
        model.layers[1].unread = nn.Parameter(torch.randn(3))
        torch.testing.assert_close(compiled(x), expected(model, x))

    def test_layers_compiled_one_by_one(self) -> None:
        model, x = Layers(), torch.randn(4, 3)
        with torch.no_grad():
            model.layers[1].unread.fill_(-2.0)
        want = expected(model, x)
        for layer in model.layers:
            layer.compile(backend=adding_unread)
        torch.testing.assert_close(model(x), want)

    def test_function_over_a_model(self) -> None:
        model, x = Layers(), torch.randn(4, 3)

        @torch.compile(backend=adding_unread)
        def step(x: Tensor) -> Tensor:
            return model(x) + 2

        torch.testing.assert_close(step(x), expected(model, x) + 2)

    @pytest.mark.parametrize("path", [("unread",), ("no_such",), ("layers",)])
    def test_what_cannot_be_an_input(self, path: tuple[str, ...]) -> None:
        """A module that the frame does not lead to, an attribute that is not there, and one that is no tensor."""
        model = Layers()
        owner = Scale() if path == ("unread",) else model

        def question(module: fx.GraphModule) -> Any:
            with pytest.raises(LookupError, match=f"{type(owner).__name__}"):
                reach.add_tensor_input(module.graph, owner, path)
            return len(module.graph.nodes)

        (count,) = ask_of_graphs(question, model, torch.ones(3))
        assert count == len(ask_of_graphs(lambda module: module.graph.nodes, model, torch.ones(3))[0])

    def test_no_trace(self) -> None:
        with pytest.raises(LookupError, match="holds no reference to Scale"):
            reach.add_tensor_input(fx.Graph(), Scale(), ("unread",))
