"""Guards on the numbers that a tensor holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from llcompile.torch_internals.guards import SameNumbers, guard_numbers
from tests.helpers.traces import Asking


class TestSameNumbers:
    @pytest.mark.parametrize("size", [3, 1 << 15])
    def test_a_tensor_that_changes(self, size: int) -> None:
        tensor = torch.randn(size)
        check = SameNumbers(tensor)
        assert check(tensor)
        assert check(tensor.clone())
        tensor[-1] += 1
        assert not check(tensor)
        tensor[-1] = check.numbers[-1]
        assert check(tensor)

    def test_another_tensor(self) -> None:
        check = SameNumbers(torch.tensor([1.0, float("nan")]))
        assert check(torch.tensor([1.0, float("nan")]))
        assert not check(torch.tensor([1.0, 2.0]))
        assert not check(torch.tensor([1.0]))
        assert not check(torch.tensor([1.0, float("nan")], dtype=torch.float64))

    def test_writes_that_torch_does_not_count(self) -> None:
        tensor = torch.ones(3)
        check = SameNumbers(tensor)
        tensor.data[0] = 2
        assert not check(tensor)

    def test_a_tensor_of_inference_mode(self) -> None:
        with torch.inference_mode():
            tensor = torch.zeros(1 << 15, dtype=torch.int64)
            check = SameNumbers(tensor)
            assert check(tensor)
            tensor[0] = 1
            assert not check(tensor)

    def test_a_fake_tensor(self) -> None:
        """It has no numbers; torch.export puts it in the place of the real one."""
        check, mode = SameNumbers(torch.ones(3)), FakeTensorMode()
        assert check(mode.from_tensor(torch.zeros(3)))
        assert not check(mode.from_tensor(torch.zeros(4)))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("guarded", [False, True])
def test_guard_numbers(guarded: bool) -> None:
    table = torch.arange(3.0)

    def question(module: fx.GraphModule) -> Any:
        node = module.graph.find_nodes(op="placeholder")[1]
        return guard_numbers(node, table) if guarded else None

    def function(x: Tensor, table: Tensor) -> Tensor:
        return x * table

    backend = Asking(question)
    run = torch.compile(function, backend=backend)
    for _ in range(2):
        run(torch.ones(3), table)
    run(torch.zeros(3), table.clone())
    assert backend.answers == [guarded or None]
    table[0] = 7
    run(torch.ones(3), table)
    assert backend.count == 1 + guarded


@pytest.mark.usefixtures("fresh_dynamo")
def test_no_guard_without_a_trace() -> None:
    kept: list[fx.Node] = []
    backend = Asking(lambda module: kept.extend(module.graph.find_nodes(op="placeholder")))
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert not guard_numbers(kept[0], torch.ones(2))
    assert not guard_numbers(fx.Graph().placeholder("x"), torch.ones(2))
