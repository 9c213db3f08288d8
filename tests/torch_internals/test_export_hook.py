"""torch.export records a module by its rewritten graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llcompile.torch_internals.export_hook import install
from tests.helpers.traces import Layers, Scale


def rewritten_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return module.forward(*args, **kwargs) + 10


@pytest.fixture(autouse=True)
def hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that have a layer `Scale` at the top are recorded rewritten, until the end of the test."""
    from torch.export import _trace

    monkeypatch.setattr(_trace, "_export", _trace._export)
    install(lambda module: isinstance(module, Scale), rewritten_call)


def exported(module: nn.Module, **given: Any) -> list[float]:
    x = torch.ones(3)
    return torch.export.export(module, (x,), **given).module()(x).tolist()


def test_a_module_that_has_levels() -> None:
    module = Scale()
    assert exported(module) == [11, 11, 11]
    assert module(torch.ones(3)).tolist() == [1, 1, 1]  # as it was
    assert exported(module, strict=False) == [11, 11, 11]


def test_others_are_recorded_as_they_are() -> None:
    assert exported(Layers()) == [1, 1, 1]


def test_a_trace_by_dynamo_is_left_alone() -> None:
    assert exported(Scale(), strict=True) == [1, 1, 1]


def test_a_module_is_as_it_was_after_an_error() -> None:
    class Failing(Scale):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("of a test")

    module = Failing()
    with pytest.raises(ValueError, match="of a test"):
        torch.export.export(module, (torch.ones(3),))
    assert module._compiled_call_impl is None
