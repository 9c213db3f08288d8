"""Forgetting what Dynamo has compiled with modules of some classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from llcompile.torch_internals.forget import forget_compiled, forget_others
from tests.helpers.traces import Asking, Layers, Scale

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Other(nn.Module):
    by = 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


def compiled(module: nn.Module) -> tuple[Callable[[], Any], Asking]:
    """A compiled call, made once, and its backend, which has been handed one graph."""
    backend, x = Asking(), torch.ones(3)
    run = torch.compile(module, backend=backend)
    run(x)
    run(x)
    assert backend.count == 1
    return lambda: run(x), backend


class TestForgetCompiled:
    def test_only_modules_of_these_classes(self) -> None:
        (run, backend), (run_other, other) = compiled(Layers()), compiled(Other())
        forget_compiled([Scale], lambda _: False)  # it is below what is compiled
        for call in (run, run_other, run):
            call()
        assert (backend.count, other.count) == (2, 1)

    def test_no_classes(self) -> None:
        run, backend = compiled(Layers())
        forget_compiled([], lambda _: False)
        run()
        assert backend.count == 1

    def test_what_was_compiled_for_a_passing_backend(self) -> None:
        (run, backend), (run_other, other) = compiled(Scale()), compiled(Other())
        forget_compiled([], lambda found: found is backend)
        run()
        run_other()
        assert (backend.count, other.count) == (2, 1)


def test_forget_others() -> None:
    """From inside of a compilation; the code of our own backend stays."""
    (run, backend), (run_ours, ours), (run_apart, apart) = compiled(Scale()), compiled(Layers()), compiled(Other())

    def forgetting(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        forget_others([Scale], lambda found: found is ours)
        return module.forward

    torch.compile(lambda x: x + 1, backend=forgetting)(torch.ones(2))
    for call in (run, run_ours, run_apart, run):
        call()
    assert (backend.count, ours.count, apart.count) == (2, 1, 1)
