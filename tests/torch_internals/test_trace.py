"""The trace under way: where it stands, what ended it, notes for its length, and tracing once more."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.callback import callback_handler

from llcompile.torch_internals.frame import current_output
from llcompile.torch_internals.trace import (
    at_compile_end,
    below_export,
    forget_guards_of_one_call,
    is_resumed,
    is_traced_graph,
    is_whole_frame,
    leave_out,
    note_trace,
    restart_trace,
    surfacing,
    trace_note,
    trace_position,
    traced_once,
    without_traces_of_transforms,
)
from tests.helpers.traces import Asking, Layers, Scale, ask_of_graphs, asked_while_traced

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def whole(x: Tensor) -> Tensor:
    return x + 1


def broken(x: Tensor) -> Tensor:
    x = x + 1
    torch._dynamo.graph_break()
    return x + 2


@pytest.mark.parametrize("left_out", [False, True])
def test_leave_out(left_out: bool) -> None:
    """A hook, say, that is called beside compiled code; where a caller is traced, it is traced with it."""

    def helper(x: Tensor) -> Tensor:
        return x + 1

    if left_out:
        leave_out(helper)
    asking = Asking(lambda module: len(module.graph.find_nodes(op="output")))
    assert torch.compile(helper, backend=asking)(torch.ones(2)).tolist() == [2, 2]
    assert asking.count == (not left_out)
    assert torch.compile(lambda x: helper(x) * 2, backend=asking, fullgraph=True)(torch.ones(2)).tolist() == [4, 4]
    assert asking.count == 2 - left_out


def test_notes_last_for_one_trace() -> None:
    def note() -> Any:
        before = trace_note("of_a_test")
        note_trace("of_a_test", 1)
        return before

    ask, answers = asked_while_traced(note)
    for _ in range(2):
        asking = Asking(lambda _: trace_note("of_a_test"))
        torch.compile(lambda x: x + ask() + ask(), backend=asking)(torch.ones(2))
        assert asking.answers == [1]
    assert answers == [None, 1] * 2
    note_trace("of_a_test", 1)
    assert trace_note("of_a_test") is None


def test_is_traced_graph() -> None:
    def question(module: fx.GraphModule) -> Any:
        return is_traced_graph(module), is_traced_graph(fx.GraphModule(module, fx.Graph(module)))

    assert ask_of_graphs(question, whole, torch.ones(2)) == [(True, False)]
    assert is_traced_graph(fx.GraphModule(torch.nn.Module(), fx.Graph()))


def test_trace_position() -> None:
    ask, answers = asked_while_traced(trace_position)

    class Asked(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight + ask()

    model = torch.nn.Sequential(torch.nn.Identity(), Asked())
    torch.compile(lambda x: model(x), backend="eager")(torch.ones(3))
    (position,) = answers
    key = list(position["nn_module_stack"])[-1]
    assert key.split("@")[0] == str(id(model[1]))
    assert position["nn_module_stack"][key][1] is Asked
    line = Asked.forward.__code__.co_firstlineno + 1
    assert f'File "{__file__}", line {line}, in forward' in position["stack_trace"]
    assert trace_position() == {}


def test_whole_and_resumed_frames() -> None:
    def question(_: Any) -> Any:
        return is_whole_frame(), is_resumed()

    assert ask_of_graphs(question, whole, torch.ones(2)) == [(True, False)]
    assert ask_of_graphs(question, broken, torch.ones(2)) == [(False, False), (False, True)]
    assert question(None) == (False, False)


class TestAtCompileEnd:
    @pytest.fixture
    def ends(self) -> Any:
        ends: list[Any] = []
        before = list(callback_handler.end_callbacks)
        at_compile_end(ends.append)
        yield ends
        callback_handler.end_callbacks[:] = before

    def test_a_compilation_that_succeeds(self, ends: list[Any]) -> None:
        run = torch.compile(whole, backend=Asking(lambda _: ends.append("compiled")))
        run(torch.ones(2))
        assert ends[0] == "compiled"
        assert len(ends) == 2
        run(torch.ones(2))
        assert len(ends) == 2

    def test_a_compilation_that_fails(self, ends: list[Any]) -> None:
        def failing(_: Any) -> None:
            raise ValueError("of a test")

        with pytest.raises(Exception, match="of a test"):
            torch.compile(whole, backend=Asking(failing))(torch.ones(2))
        assert len(ends) == 1

    def test_it_is_registered_once(self, ends: list[Any]) -> None:
        count = len(callback_handler.end_callbacks)
        kept = ends.append
        at_compile_end(kept)
        assert len(callback_handler.end_callbacks) == count


def test_restart_traces_again() -> None:
    seen: list[int] = []

    def backend(graph_module: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        seen.append(len(graph_module.graph.nodes))
        if len(seen) == 1:
            model.layers[0].register_forward_hook(lambda module, args, output: output + 1)
            restart_trace("the test changed a module")
        return graph_module.forward

    model, x = Layers(), torch.randn(4, 3)
    result = torch.compile(model, backend=backend)(x)
    assert len(seen) == 2
    torch.testing.assert_close(result, (x * model.layers[0].weight + 1) * model.layers[1].weight)


class Refused(Exception):
    """An error of a backend's."""


@pytest.mark.parametrize("shown", [False, True])
def test_surfacing(shown: bool) -> None:
    """Without it, users get an error of Dynamo's."""

    def failing(_: Any) -> None:
        with surfacing(Refused) if shown else nullcontext():
            raise Refused("of a test", 1)

    with pytest.raises(Exception, match="of a test") as caught:
        ask_of_graphs(failing, whole, torch.ones(2))
    assert isinstance(caught.value, Refused) is shown
    if shown:
        text, number = caught.value.args
        assert text.startswith("of a test")  # Dynamo adds a hint
        assert number == 1
        assert (type(caught.value).__name__, type(caught.value).__module__) == ("Refused", __name__)


def test_traced_once() -> None:
    """It is traced for this backend only, and what was compiled of the function before stays."""
    first, second = Asking(), Asking()
    offset = 1

    def function(x: Tensor) -> Tensor:
        return x + offset

    run = torch.compile(function, backend=first)
    run(torch.ones(2))
    for _ in range(2):
        assert traced_once(function, second)(torch.ones(2)).tolist() == [2, 2]
    run(torch.ones(2))
    assert (first.count, second.count) == (1, 2)


@pytest.mark.parametrize("by_dynamo", [False, True])
def test_below_export(by_dynamo: bool) -> None:
    """What Dynamo has traced is recorded as it runs, as what runs eagerly is."""
    graphs: list[int] = []

    class Traced(Scale):
        def forward(self, x: Tensor) -> Tensor:
            if not by_dynamo:
                return x * self.weight
            with below_export() as record:

                def backend(module: fx.GraphModule, inputs: list[Any]) -> Any:
                    graphs.append(len(module.graph.nodes))
                    return record(module, inputs)

                return traced_once(lambda x: x * self.weight, backend)(x)

    model, x = Traced(2.0), torch.ones(3)
    program = torch.export.export(model, (x,))
    assert program.module()(x).tolist() == [2, 2, 2]
    assert [str(n.target) for n in program.graph.nodes if n.op == "call_function"] == ["aten.mul.Tensor"]
    assert len(graphs) == by_dynamo


class TestTracesOfTransforms:
    def fail_inside(self) -> None:
        functorch = torch._C._functorch
        torch._C._autograd._saved_tensors_hooks_disable("of a test")
        functorch._grad_increment_nesting()
        raise ValueError("of a test")

    def test_an_error_leaves_none(self) -> None:
        with pytest.raises(ValueError, match="of a test"), without_traces_of_transforms():
            self.fail_inside()
        assert torch._C._functorch.maybe_current_level() is None
        assert torch._C._autograd._saved_tensors_hooks_is_enabled()

    def test_what_was_open_before_stays_open(self) -> None:
        levels: list[Any] = []

        def loss(x: Tensor) -> Tensor:
            levels.append(torch._C._functorch.maybe_current_level())
            with pytest.raises(ValueError, match="of a test"), without_traces_of_transforms():
                self.fail_inside()
            levels.append(torch._C._functorch.maybe_current_level())
            levels.append(torch._C._autograd._saved_tensors_hooks_is_enabled())
            return x.sin().sum()

        x = torch.ones(3)
        torch.testing.assert_close(torch.func.grad(loss)(x), x.cos())
        assert levels == [1, 1, False]

    def test_no_error(self) -> None:
        with without_traces_of_transforms():
            assert torch.func.grad(torch.sin)(torch.tensor(0.0)).item() == 1
        assert torch._C._functorch.maybe_current_level() is None


class TestForgetGuardsOfOneCall:
    """What runs once needs no guards; what may run again keeps them."""

    def test_a_call_that_is_made_once(self) -> None:
        def count_guards(_: fx.GraphModule) -> int:
            before = len(current_output().guards)
            forget_guards_of_one_call()
            return before - len(current_output().guards)

        asking = Asking(count_guards)
        model = Layers()
        assert torch.equal(traced_once(model, asking)(torch.ones(2, 3)), model(torch.ones(2, 3)))
        assert asking.count == 1
        assert asking.answers[0] > 5, "it had some"
        torch.compile(model, backend=asking)(torch.ones(2, 3))
        assert asking.answers[1] == 0, "others call this more than once"

    def test_what_follows_a_graph_break_is_guarded(self) -> None:
        class Counting(torch.nn.Module):
            step = 0

            def forward(self, x: Tensor) -> Tensor:
                torch._dynamo.graph_break()
                return x + self.step

        def twice(x: Tensor) -> Tensor:
            model.step = 1
            x = model(x)
            model.step = 10
            return model(x)

        model = Counting()
        asking = Asking(lambda _: forget_guards_of_one_call())
        assert traced_once(twice, asking)(torch.zeros(1)).tolist() == [11]
