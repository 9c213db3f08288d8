"""What a node writes to, and whose memory its result shows: told by what it does, whatever it is called."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from llcompile.passes.dead import erase_dead, live
from llcompile.patterns.graph.effects import Effects

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def graph_of(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """What Dynamo makes of a function."""
    found: list[fx.GraphModule] = []

    def keep(module: fx.GraphModule, _: Any) -> Any:
        found.append(module)
        return module.forward

    with torch.no_grad():
        torch.compile(function, backend=keep, fullgraph=True)(*inputs)
    return found[0]


def effects_of(function: Callable[..., Any], *inputs: Tensor) -> tuple[Effects, list[fx.Node]]:
    module = graph_of(function, *inputs)
    return Effects(module, module.graph), list(module.graph.nodes)


X = torch.arange(12.0).view(3, 4)

WRITES: dict[str, Callable[[Tensor], Any]] = {
    "h *= 2": lambda h: operator.imul(h, 2),
    "h //= 2": lambda h: operator.ifloordiv(h, 2),
    "h **= 2": lambda h: operator.ipow(h, 2),
    "h[0] = 1": lambda h: h.__setitem__(0, 1.0),
    "h[mask] = 1": lambda h: h.__setitem__(h > 3, 1.0),
    "add_": lambda h: h.add_(1),
    "F.elu(inplace=True)": lambda h: F.elu(h, inplace=True),
    "F.hardtanh_": lambda h: F.hardtanh_(h),
    "F.dropout(inplace=True)": lambda h: F.dropout(h, 0.5, True, inplace=True),
    "out=": lambda h: torch.add(h.t(), 1, out=h.t()),
    "_foreach_neg_": lambda h: torch._foreach_neg_([h]),
    "aten overload": lambda h: torch.ops.aten.sigmoid_.default(h),
    "data": lambda h: h.data.neg_(),
    "index_fill_": lambda h: h.index_fill_(0, torch.tensor([1]), 0.0),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_through_a_view_is_a_write_to_its_base(name: str) -> None:
    def function(x: Tensor) -> Tensor:
        base = x.sin()
        WRITES[name](base[1:].t())
        return base

    effects, nodes = effects_of(function, X)
    base = next(node for node in nodes if node.target == "sin")
    placeholder = nodes[0]
    assert effects.is_written(base)
    assert not effects.is_written(placeholder)
    assert any(not effects.shows(base).isdisjoint(effects.writes(node)) for node in nodes)


READS: dict[str, Callable[[Tensor], Any]] = {
    "h * 2": lambda h: h * 2,
    "relu": lambda h: F.relu(h),
    "exp2": lambda h: h.exp2(),
    "clone and write": lambda h: h.clone().mul_(2),
    "out= of another": lambda h: torch.add(h, 1, out=torch.empty(4, 2)),
    "masked_fill": lambda h: h.masked_fill(h > 3, 0.0),
}


@pytest.mark.parametrize("name", READS)
def test_what_only_reads(name: str) -> None:
    def function(x: Tensor) -> Any:
        base = x.sin()
        return base, READS[name](base[1:].t())

    effects, nodes = effects_of(function, X)
    assert not effects.is_written(next(node for node in nodes if node.target == "sin"))


def test_memory_is_shared_by_views_and_by_nothing_else() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        a = x.sin()
        return a, a.view(-1), a.to(torch.float32), a.to(a.device), a.detach(), a.t().contiguous(), a + 0

    effects, nodes = effects_of(function, X)
    base, *others = (n for n in nodes if isinstance(n.meta.get("example_value"), Tensor) and n.op != "placeholder")
    shown = {node.name: effects.shows(node) == effects.shows(base) for node in others}
    alike = [name for name, same in shown.items() if same]
    assert {"view", "detach"} <= set(alike)
    assert not {"contiguous", "add"} & set(alike)
    assert shown.get("to", True)


def test_only_what_a_rewrite_left_dead_is_erased() -> None:
    """`used` loses its reader and goes, with a write that only it read; `idle` was dead before and stays."""

    def function(x: Tensor) -> Tensor:
        idle = x.cos()  # noqa: F841
        buffer = torch.zeros(3, 4)
        buffer[0] = x[0]
        used = buffer.exp()
        kept = x.tan()
        kept[1:] += 1
        return used + kept

    module = graph_of(function, X)
    graph, effects = module.graph, Effects(module, module.graph)
    before = live(graph, effects)
    named = {str(getattr(node.target, "__name__", node.target)): node for node in graph.nodes}
    named["exp"].replace_all_uses_with(named["tan"])
    erase_dead(graph, effects, before)
    left = [str(getattr(node.target, "__name__", node.target)) for node in graph.nodes]
    assert "exp" not in left
    assert "zeros" not in left
    assert left.count("setitem") <= 1
    assert "iadd" in left
    assert "cos" in left or "cos" not in named
    module.recompile()
    expected = X.tan()
    expected[1:] += 1
    assert torch.equal(module(X)[0], 2 * expected)
