"""DDP's optimizer cuts a graph after it was rewritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from llcompile.torch_internals.splitters import install
from tests.helpers.traces import Asking

distributed = pytest.importorskip("torch._dynamo.backends.distributed")
pytestmark = pytest.mark.usefixtures("fresh_dynamo")

MODEL = nn.Sequential(*(nn.Linear(512, 512) for _ in range(3)))  # a bucket each


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was done; DDP's optimizer is as before afterwards."""
    monkeypatch.setattr(distributed.DDPOptimizer, "compile_fn", distributed.DDPOptimizer.compile_fn)
    return []


def run_split(steps: list[Any]) -> tuple[Asking, Tensor]:
    """The backend of the pieces, and the result of the pieces."""

    def piece(module: fx.GraphModule) -> None:
        steps.append("piece")

    backend = Asking(piece)
    optimizer = distributed.DDPOptimizer(1 << 20, backend, first_bucket_cap=1 << 20)
    return backend, torch._dynamo.optimize(optimizer.compile_fn)(MODEL)(torch.ones(2, 512))


def test_pieces_are_pieces_of_what_was_rewritten(steps: list[Any]) -> None:
    def rewrite(module: fx.GraphModule, backend: Any) -> Callable[[Any], Any]:
        steps.append(backend)
        for node in module.graph.find_nodes(op="call_function", target=torch._C._nn.linear):
            node.target = lambda x, weight, bias: x + 1
        module.recompile()

        def finish(compiled: Callable[..., Any]) -> Callable[..., Any]:
            steps.append("finish")
            return lambda *args: [out * 10 for out in compiled(*args)]

        return finish

    install(rewrite)
    backend, result = run_split(steps)
    assert steps == [backend, "piece", "piece", "piece", "finish"]
    assert result.tolist() == [[40.0] * 512] * 2


def test_a_backend_that_is_not_ours(steps: list[Any]) -> None:
    install(lambda module, backend: steps.append(backend))
    backend, result = run_split(steps)
    assert steps == [backend, "piece", "piece", "piece"]
    torch.testing.assert_close(result, MODEL(torch.ones(2, 512)))
