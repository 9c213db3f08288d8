"""Sizes that may vary from call to call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from llcompile.torch_internals.sizes import dims_by_stride, hold_size, is_symbolic, size_hint
from tests.helpers.traces import Asking, ask_of_graphs, node_of

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def size_of(module: fx.GraphModule) -> Any:
    """The first size of what the graph adds up."""
    return node_of(module, "add").meta["example_value"].shape[0]


def ask_of_a_size_that_depends_on_data(question: Callable[[Any], Any]) -> tuple[type, Any]:
    """Its type, and what was answered of it."""

    def ask(module: fx.GraphModule) -> Any:
        size = node_of(module, "nonzero").meta["example_value"].shape[0]
        return type(size), question(size)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        (found,) = ask_of_graphs(ask, torch.nonzero, torch.ones(5))
    return found


def add(x: Tensor) -> Tensor:
    return x + 1


class TestSizeHint:
    def test_sizes_that_vary(self) -> None:
        def question(module: fx.GraphModule) -> Any:
            size = size_of(module)
            more = size * 2 + 1
            return type(size), size_hint(size), size_hint(more), size_hint(size > 4), size_hint(more, factor=10)

        assert ask_of_graphs(question, add, torch.ones(5), dynamic=True) == [(torch.SymInt, 5, 11, True, 101)]

    def test_a_size_that_depends_on_data(self) -> None:
        assert ask_of_a_size_that_depends_on_data(size_hint) == (torch.SymInt, None)

    @pytest.mark.parametrize("size", [5, None, 1.5])
    def test_numbers(self, size: Any) -> None:
        assert size_hint(size) == size
        assert size_hint(size, factor=10) == size


class TestDimsByStride:
    def test_dense(self) -> None:
        x = torch.ones(2, 3, 4)
        assert dims_by_stride(x) == [0, 1, 2]
        assert dims_by_stride(x.permute(2, 0, 1)) == [1, 2, 0]

    def test_not_dense(self) -> None:
        assert dims_by_stride(torch.ones(2, 3, 4)[:, ::2]) is None
        assert dims_by_stride(torch.ones(3, 1).expand(3, 4)) is None

    def test_sizes_that_vary(self) -> None:
        def question(module: fx.GraphModule) -> Any:
            return dims_by_stride(node_of(module, "transpose").meta["example_value"])

        assert ask_of_graphs(question, lambda x: x.transpose(0, 1), torch.ones(5, 6), dynamic=True) == [[1, 0]]


class TestHoldSize:
    @pytest.mark.parametrize("held", [False, True])
    def test_another_size_is_traced_again(self, held: bool) -> None:
        backend = Asking(lambda module: hold_size(size_of(module)) if held else None)
        run = torch.compile(add, backend=backend, dynamic=True)
        for length in (5, 6, 5):
            assert run(torch.ones(length)).shape == (length,)
        assert backend.answers == ([True, True] if held else [None])

    def test_a_comparison(self) -> None:
        backend = Asking(lambda module: hold_size(size_of(module) > 3))
        run = torch.compile(add, backend=backend, dynamic=True)
        for length in (5, 6, 2):
            run(torch.ones(length))
        assert backend.answers == [True, True]

    @pytest.mark.parametrize("size", [5, 1.5, True])
    def test_numbers(self, size: Any) -> None:
        assert hold_size(size)

    def test_where_the_user_demands_that_it_varies(self) -> None:
        x = torch.ones(5)
        torch._dynamo.mark_dynamic(x, 0)
        assert ask_of_graphs(lambda module: hold_size(size_of(module)), add, x) == [False]

    def test_a_size_that_depends_on_data(self) -> None:
        assert ask_of_a_size_that_depends_on_data(hold_size) == (torch.SymInt, False)


@pytest.mark.parametrize("dynamic", [False, True])
def test_is_symbolic(dynamic: bool) -> None:
    assert ask_of_graphs(lambda m: is_symbolic(m.graph), add, torch.ones(5), dynamic=dynamic) == [dynamic]


def test_a_number_that_varies_is_symbolic() -> None:
    def scaled(x: Tensor, n: int) -> Tensor:
        return x[:3] * n

    backend = Asking(lambda module: is_symbolic(module.graph))
    run = torch.compile(scaled, backend=backend)
    for n in (4, 5):
        run(torch.ones(5), n)
    assert backend.answers == [False, True]


def test_no_inputs() -> None:
    assert not is_symbolic(fx.Graph())
