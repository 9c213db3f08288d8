"""Which steps are updated in place: those whose state the program copies back, with nothing in between."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from llcompile.passes.in_place import in_place
from llcompile.patterns.graph.regions import regions
from tests.kernels.kernel_cases import operands


def step(q: Tensor, k: Tensor, v: Tensor, w: Tensor, state: Tensor, g: Tensor) -> Any:
    return torch.ops.llcompile.loglinear_attention_step(q, k, v, w, state, g, None, None, None, None, 1.0)


def copied(q, k, v, w, state, g):
    o, new = step(q, k, v, w, state, g)
    state.copy_(new)
    return o, state


def copied_twice(q, k, v, w, state, g):
    o, new = step(q, k, v, w, state, g)
    state.copy_(new)
    return o, new + 1


def read_between(q, k, v, w, state, g):
    o, new = step(q, k, v, w, state, g)
    old = state.sum()
    state.copy_(new)
    return o, old


def view_read_between(q, k, v, w, state, g):
    view = state[:, :1]
    o, new = step(q, k, v, w, state, g)
    old = view + 1
    state.copy_(new)
    return o, old


def copied_elsewhere(q, k, v, w, state, g):
    other = state.clone()
    o, new = step(q, k, v, w, state, g)
    other.copy_(new)
    return o, other


def returned(q, k, v, w, state, g):
    return tuple(step(q, k, v, w, state, g)[i] for i in range(2))


def given(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x = operands(1, "token", False, 4, state="level", dtype=torch.float32)
    token = {n: t if t is None or n == "initial_state" else t[:, 0] for n, t in x.items()}
    found = [token[n] for n in ("q", "k", "v", "level_weights", "initial_state", "log_decay")]
    found[4] = found[4].to(dtype)  # type: ignore[union-attr]
    return found  # type: ignore[return-value]


def rewritten(program: Callable[..., Any], dtype: torch.dtype = torch.float32) -> tuple[fx.GraphModule, int]:
    """The program after the pass, and how many steps it rewrote."""
    module = fx.symbolic_trace(program)

    class Noting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            n.meta["example_value"] = found = super().run_node(n)
            return found

    Noting(module).run(*given(dtype))
    count = in_place(SimpleNamespace(regions=regions(module)))  # type: ignore[arg-type]
    module.graph.lint()
    module.recompile()
    return module, count


@pytest.mark.parametrize(
    ("program", "count"),
    [(copied, 1), (copied_twice, 0), (read_between, 0), (view_read_between, 0), (copied_elsewhere, 0), (returned, 0)],
)
def test_only_where_nobody_can_tell(program: Callable[..., Any], count: int) -> None:
    """The results, and the state that is left behind, are as before."""
    with torch.no_grad():
        module, found = rewritten(program)
        assert found == count
        assert ("loglinear_attention_step_" in {str(n.target).split(".")[-1] for n in module.graph.nodes}) == count
        mine, own = given(), given()
        for ours, want in zip(module(*mine), program(*own), strict=True):
            assert torch.allclose(ours, want, atol=1e-6)
    assert torch.allclose(mine[4], own[4], atol=1e-6)


def test_not_in_fewer_bits_or_with_gradients() -> None:
    with torch.no_grad():
        assert rewritten(copied, torch.bfloat16)[1] == 0
    assert rewritten(copied)[1] == 0
