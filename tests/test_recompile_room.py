"""Models that Dynamo compiles in pieces: its limit counts for each module, and what falls back says why it fails."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

import llcompile
from llcompile.errors import EagerStateWarning
from tests.helpers import small
from tests.helpers.small import difference

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

States = dict[int, Tensor]


class Breaking(small.DeltaMixer):
    """A layer with a state, and with a graph break after its mixer."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor, states: States | None = None) -> Tensor:
        states = {} if states is None else states
        before = states.get(self.index)
        o, states[self.index] = torch_chunk_gated_delta_rule(
            *self.operands(x), initial_state=before, output_final_state=True
        )
        torch._dynamo.graph_break()
        return x + 0.1 * self.out(o.flatten(-2))


class Layers(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Breaking(index) for index in range(count))

    def forward(self, x: Tensor, states: States) -> Tensor:
        for layer in self.layers:
            x = layer(x, states)
        return x


def test_the_limit_counts_for_each_module() -> None:
    """More layers than the limit, each with graphs of its own: all are converted, and all keep their levels."""
    model, x = Layers(3), torch.randn(2, 6, 16)
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        assert len(llcompile.convert(model, x, {}, verify=False).converted) == 3
        small.perturb(model)
        model.compile(backend="loglinear", options={"inner": "eager"})
        whole = model(x, {})
        torch._dynamo.reset()
        states: States = {}
        parts = [model(part, states) for part in x.split([5, 1], dim=1)]
    assert [list(state.shape) for state in states.values()] == [[2, 2, 18, 8, 8]] * 3
    assert difference(torch.cat(parts, 1), whole) < 1e-5


def test_code_that_falls_back_says_why_it_fails() -> None:
    """The library's own code cannot read a state with levels: its error comes with a warning that names both."""
    layer, x = Breaking(0), torch.randn(2, 5, 16)
    llcompile.convert(layer, x, verify=False)
    states = {0: torch.zeros(2, 2, 18, 8, 8)}
    match = r"Breaking was run eagerly.*torch_chunk_gated_delta_rule.*shape \[2, 2, 18, 8, 8\].*recompile_limit"
    with torch.no_grad(), pytest.warns(EagerStateWarning, match=match), pytest.raises(RuntimeError):
        layer(x, states)


@pytest.mark.filterwarnings("error::llcompile.errors.EagerStateWarning")
def test_other_errors_come_without_it() -> None:
    layer = Breaking(0)
    llcompile.convert(layer, torch.randn(2, 5, 16), verify=False)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.randn(2, 5, 7))
