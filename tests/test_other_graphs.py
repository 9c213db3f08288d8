"""Graphs that others made of a model: exported, symbolically traced, cut into parts; then compiled by our backend."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.split_module import split_module
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

import llcompile
from llcompile import backend
from tests.helpers import small

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore"),
]
OPTIONS = {"inner": "eager"}
LENGTH = 9


class Mixer(nn.Module):
    """Linear attention that any tracer can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return x + (q @ k.transpose(-1, -2)).tril() @ v / 16


def exported(model: nn.Module) -> nn.Module:
    return torch.export.export(model, (small.ids(length=LENGTH),)).module()


def decomposed(model: nn.Module) -> nn.Module:
    return torch.export.export(model, (small.ids(length=LENGTH),)).run_decompositions().module()


def unflattened(model: nn.Module) -> nn.Module:
    return torch.export.unflatten(torch.export.export(model, (small.ids(length=LENGTH),)))


class _Layers(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
        return isinstance(m, Mixer) or super().is_leaf_module(m, qualname)


def traced_around_layers(model: nn.Module) -> nn.Module:
    return fx.GraphModule(model, _Layers().trace(model))


def cut(traced: Any) -> nn.Module:
    """Cut in two where the second layer begins."""
    nodes = list(traced.graph.nodes)
    of_layer = lambda node: "layers_1" in str([node, *node.all_input_nodes])  # noqa: E731
    begin = next(i for i, node in enumerate(nodes) if node.op.startswith("call") and of_layer(node))
    behind = set(itertools.islice(nodes, begin, None))
    return split_module(traced, None, lambda node: int(node in behind))  # type: ignore[arg-type]


def cut_traced(model: nn.Module) -> nn.Module:
    return cut(fx.symbolic_trace(model))


def cut_exported(model: nn.Module) -> nn.Module:
    return cut(exported(model))


def functions_alone(model: nn.Module) -> nn.Module:
    """ATen operations with the parameters as constants: no module is left."""
    return make_fx(model)(small.ids(length=LENGTH))


WITH_LAYERS = (exported, decomposed, unflattened, traced_around_layers)


def output(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(ids)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize(
    "made",
    [
        exported,
        pytest.param(decomposed, marks=pytest.mark.slow),
        unflattened,
        fx.symbolic_trace,
        pytest.param(traced_around_layers, marks=pytest.mark.slow),
        pytest.param(cut_traced, marks=pytest.mark.slow),
        pytest.param(cut_exported, marks=pytest.mark.slow),
        pytest.param(functions_alone, marks=pytest.mark.slow),
    ],
)
def test_a_graph_of_another(made: Callable[[nn.Module], nn.Module]) -> None:
    """It computes what it did; its mixers have level weights that act, or a reason in the report."""
    torch.manual_seed(0)
    ids = small.ids(length=LENGTH)
    graph = made(small.Model([Mixer(), Mixer()]))
    before = output(graph, ids).detach()
    run = torch.compile(graph, backend="loglinear", options=OPTIONS)
    assert small.difference(output(run, ids), before) < 1e-5
    report = backend.last_report()
    names = [name for name, _ in graph.named_parameters() if "loglinear" in name]
    if not names:
        assert not report.converted
        assert report.declined
        assert all(d.reason for d in report.declined)
        return
    assert len(names) == 4, report
    if made in WITH_LAYERS:
        assert [c.module for c in report.converted] == ["layers.0", "layers.1"]
    small.perturb(graph)
    assert small.difference(output(run, ids), before) > 1e-3


class Padded(small.DeltaMixer):
    """Chunks of eight tokens, to which the sequence is padded."""

    def forward(self, x: Tensor) -> Tensor:
        o, _ = torch_chunk_gated_delta_rule(*self.operands(x), chunk_size=8, use_qk_l2norm_in_kernel=True)
        return x + self.out(o.flatten(-2).to(x.dtype))


def test_what_an_export_writes_and_nobody_reads() -> None:
    """In exported code a write into a part returns that part: no second mixer, of the padded tokens, ends there."""
    torch.manual_seed(0)
    model, ids = small.Model([Padded()]), small.ids(length=5)
    graph = torch.export.export(model, (ids,)).module()
    before = graph(ids).detach()
    llcompile.convert(graph, ids, verify=False)
    run = torch.compile(graph, backend="loglinear", options=OPTIONS)
    assert small.difference(run(ids), before) < 1e-5
    assert [c.family for c in backend.last_report().converted] == ["Gated DeltaNet"]
    assert sum("loglinear" in name for name, _ in graph.named_parameters()) == 2
    small.perturb(graph)
    assert small.difference(run(ids), before) > 1e-3
