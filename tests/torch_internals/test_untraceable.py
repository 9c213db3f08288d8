"""What an inner compiler cannot trace becomes a graph break, as it does with other backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed

import llcompile
from llcompile.torch_internals.frame import current_output
from llcompile.torch_internals.untraceable import let_break
from tests.helpers import small
from tests.helpers.traces import ask_of_graphs
from tests.models.converted import compiled, weights_of

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:Error detected in:UserWarning"),  # what cannot be traced, which is meant
]


@torch.library.custom_op("llcompile_test::rows", mutates_args=())
def rows(x: Tensor, counts: Tensor) -> Tensor:
    return x * 1


@rows.register_fake
def _(x: Tensor, counts: Tensor) -> Tensor:
    return torch.empty_like(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    """Reads values on the host, as the experts of transformers before 5.23 do."""
    return torch.cat([part * 1 for part in grad.split(ctx.counts.tolist())]), None


rows.register_autograd(_backward, setup_context=lambda ctx, inputs, output: setattr(ctx, "counts", inputs[1]))


@torch._dynamo.allow_in_graph
def allowed(x: Tensor) -> Tensor:
    return x + 0


class Untraceable(nn.Module):
    """An operation whose gradient cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        counts = torch.tensor([x.shape[0] - 1, 1])
        return rows(x, counts)


class Asking(Untraceable):
    """The same after a function of the user's that is to stay in the graph."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(allowed(x))


def layers(last: type[nn.Module]) -> small.Model:
    torch.manual_seed(0)
    return small.Model([small.DeltaMixer(), last()])


def wants_an_error(module: fx.GraphModule) -> bool:
    let_break(module)
    return bool(current_output().has_user_defined_allowed_in_graph)


def wants_an_error_without_it(module: fx.GraphModule) -> bool:
    for node in module.graph.find_nodes(op="call_function", target=allowed):
        node.target = torch.clone
    return wants_an_error(module)


def test_functions_that_were_allowed() -> None:
    """One that is left in the graph is the user's."""
    assert ask_of_graphs(wants_an_error, lambda x: allowed(x) + 1, torch.ones(2)) == [True]
    assert ask_of_graphs(wants_an_error_without_it, lambda x: allowed(x) + 1, torch.ones(2)) == [False]
    let_break(fx.symbolic_trace(nn.Identity()))  # outside of a trace


def test_a_mixer_acts_beside_it() -> None:
    model, ids = layers(Untraceable), small.ids()
    before = model(ids)
    report = llcompile.convert(model, ids)
    assert len(report.converted) == 1
    run = compiled(model, "aot_eager")
    assert small.difference(run(ids), before) < 1e-5
    small.loss(run(ids), ids).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in weights_of(model).values())
    small.perturb(model)
    assert small.difference(run(ids), before) > 1e-3


def test_an_error_where_the_user_wants_one() -> None:
    model, ids = layers(Asking), small.ids()
    llcompile.convert(model, ids)
    with pytest.raises(BackendCompilerFailed, match="_local_scalar_dense"):
        compiled(model, "aot_eager")(ids)
