"""A rewrite leaves no trace of what it replaced, and all of what it did not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llcompile
from llcompile.torch_internals import inner
from tests.helpers import small
from tests.helpers.small import difference

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Vmapped(nn.Module):
    """One head's function of [T, K] matrices, mapped over heads and rows; `norm` is mapped with it."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.norm, self.qkv = norm, nn.Linear(16, 3 * 12)

    def head(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = torch.tril(q @ k.T) @ v
        return nn.functional.layer_norm(o, (6,)) if self.norm else o

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 16] -> [B, T, H, V]
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).unbind(2)
        return torch.vmap(torch.vmap(self.head, in_dims=1, out_dims=1))(q, k, v)


@pytest.mark.parametrize("norm", [False, True])
def test_each_vmap_that_is_opened_is_closed(norm: bool) -> None:
    torch.manual_seed(0)
    model, x, levels = Vmapped(norm), torch.randn(2, 24, 16), []
    before = model(x)

    def look(graph: Any, *_: Any) -> Any:
        levels.append([str(n.target) for n in graph.graph.nodes if "vmap_" in str(n.target)])
        return graph

    report = llcompile.convert(model, x)
    assert len(report.converted) == (0 if norm else 1), report
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inner, "compile_graph", look)
        after = torch.compile(model, backend="loglinear")(x)
    assert difference(after, before) < 1e-5
    assert len(levels[0]) == (4 if norm else 0)
    if not norm:  # a norm of one head's result is no part of the mixer, and stands between the two ends of a vmap
        small.perturb(model)
        assert difference(torch.compile(model, backend="loglinear")(x), before) > 1e-3
