"""Mixers as people write them are found, proved and rewritten; near misses are left alone (see tests/spellings)."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, fx, nn

import llcompile
from llcompile.report import Converted
from llcompile.torch_internals import inner
from tests.helpers import drawn, small
from tests.helpers.small import difference
from tests.spellings import EITHER, NEGATIVE, POSITIVE
from tests.spellings.composed import Composed, Recipe, recipes
from tests.spellings.family import expected
from tests.spellings.registry import WIDTH, Mixer, seeded

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

# What the recogniser does not see yet; each is left as it is, and a change that finds one must take it off this list.
MISSED = {
    "gated delta, chunk loop with an uneven end": "projects chunks of two widths in its loop",
    "a sum over lags": "shifts the sequence once for each lag",
    "one channel of the value at a time": "is a mixer for each channel of the value",
    "an mLSTM loop that sums its keys by hand": "multiplies and sums queries and keys by hand, and divides in its loop",
    "one C for all tokens": "reads its state by a parameter, so that no sequence is a query",
}
FOUND = [name for name in POSITIVE if name not in MISSED]

# Of what divides or scales these, something stays in the graph as it was written.
STAYS = {
    "an mLSTM loop that divides in its loop": "a loop over the largest gate",
    "a loop with a mean of gated values": "a loop over the sum of gates",
    "a loop with a sum of gates": "a loop over the sum of gates",
    "divided by the root of the sum of decays": "decays between all tokens, summed for each row",
    "means over the past": "a triangle of ones, summed for each row",
    "running means as keys": "a loop over the mean of the keys",
    "an mLSTM with its stabiliser": "gates between all tokens, of which the largest is taken for each row",
    "scores over the sum of their gates": "gates between all tokens, summed for each row",
}


def sampled(names: Iterable[str], every: int, first: int = 0) -> list[Any]:
    """All names; most of them, but never the same kind throughout, for `make test-all` only.

    `habits` has many that differ in one thing: a third as many of them.
    """
    rates = ((name, 3 * every if is_habit(name) else every) for name in names)
    return [pytest.param(name, marks=[] if i % rate == first else SLOW) for i, (name, rate) in enumerate(rates)]


def is_habit(name: str) -> bool:
    entry = POSITIVE.get(name) or NEGATIVE.get(name)
    return entry is not None and entry.file.startswith("tests.spellings.habits.")


SLOW = [pytest.mark.slow]


LEFT_ALONE = sampled(NEGATIVE, 10)
TWINS = [entry for entry in LEFT_ALONE if NEGATIVE[entry.values[0]].twin_of]


@functools.cache
def look(name: str) -> llcompile.Report:
    """What is said about an entry of the corpus."""
    entry = POSITIVE.get(name) or NEGATIVE[name]
    return llcompile.inspect(entry.make(), *entry.example())


def compiled(model: nn.Module, **given: Any) -> Any:
    return torch.compile(model, backend="loglinear", options={"inner": "eager"}, **given)


def one(report: llcompile.Report) -> Converted:
    assert len(report.converted) == 1, report
    assert report.declined == ()
    assert report.converted[0].origin == "graph"
    return report.converted[0]


@pytest.mark.parametrize("name", sampled(MISSED, 4))
def test_missed(name: str) -> None:
    """Known gaps: nothing is converted, and the model computes what it did."""
    spelling = POSITIVE[name]
    assert look(name).converted == ()
    model, inputs = spelling.make(), spelling.example(seed=1)
    with torch.no_grad():
        assert difference(compiled(model)(*inputs), model(*inputs)) < 1e-6


@pytest.mark.parametrize("name", ["associative scan", "scan of GLA"])
def test_what_is_converted_has_no_other_name(name: str) -> None:
    """The body of a scan is a recurrence as well."""
    assert look(name).converted
    assert look(name).untouched == ()


# Those of `make test` are not those of `test_rewritten`, which checks what is said as well; but for the longest loop,
# of which tracing takes most of the time: shorter ones are rewritten in test_one_token.py.
LONGEST = "loop over 128 tokens"


@pytest.mark.parametrize("name", [LONGEST if p.values[0] == LONGEST else p for p in sampled(FOUND, 8, 4)])
def test_recognised(name: str) -> None:
    check_said(name, look(name))


def check_said(name: str, report: llcompile.Report) -> None:
    """The family, the proof and the sizes are the spelling's."""
    spelling, found = POSITIVE[name], one(report)
    assert (found.decay, found.correction) in spelling.cells
    assert found.certificate.max_error <= {"float64": 1e-8, "float32": 1e-4}[found.certificate.dtype]
    assert found.certificate.draws >= 3
    assert "spellings" in found.where
    with torch.no_grad():
        operands = spelling.make().operands(*spelling.example())
    if found.key_dim == operands["k"].shape[-1]:  # a factored form may have its sizes in another order
        heads, value_dim = operands["v"].shape[2:]
        assert found.heads == heads
        assert found.value_dim in (value_dim, value_dim + 1)  # the author's own column of ones counts


# -- what the rewritten layer computes


class Recorded:
    """The graphs that reach the inner compiler."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.graphs: list[fx.GraphModule] = []
        compile_graph = inner.compile_graph

        def record(module: fx.GraphModule, *args: Any) -> Any:
            self.graphs.append(module)
            return compile_graph(module, *args)

        monkeypatch.setattr(inner, "compile_graph", record)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return Recorded(monkeypatch)


def gradients(run: Any, model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of the model's own parameters and of the inputs."""
    model.zero_grad()
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    y = run(*inputs)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    (y * weights).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and "loglinear" not in n}
    grads |= {f"input {i}": x.grad for i, x in enumerate(inputs) if x.grad is not None}
    return y.detach(), grads


def check_gone(graph: fx.GraphModule, length: int, own_sizes: set[int]) -> None:
    """No value that is T by T, no unrolled loop."""
    assert len(graph.graph.nodes) < 100
    if length in own_sizes:
        return
    for node in graph.graph.nodes:
        value = node.meta.get("example_value")
        unused = node.op == "placeholder" and not node.users  # a model's own buffer stays an input of its graph
        # A projection may be as wide as the sequence is long.
        projects = any(isinstance(n.meta.get("example_value"), nn.Parameter) for n in node.all_input_nodes)
        if isinstance(value, torch.Tensor) and not unused and not projects:
            assert [int(size) for size in value.shape].count(length) < 2, node.format_node()


PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum", "mm", "dot", "mv"}


def check_left(graph: fx.GraphModule, length: int, operands: dict[str, Any]) -> None:
    """Of a mixer whose divisor stays: no states [K, V], and nothing [T, T] that is multiplied with values."""
    key, value = operands["k"].shape[-1], operands["v"].shape[-1]
    shapes = {
        node: tuple(int(size) for size in example.shape)
        for node in graph.graph.nodes
        if isinstance(example := node.meta.get("example_value"), torch.Tensor)
    }
    assert any("loglinear_attention" in str(node.target) for node in graph.graph.nodes)
    for node, shape in shapes.items():
        if key != value:
            assert shape[-2:] not in ((key, value), (value, key)), node.format_node()
        if getattr(node.target, "__name__", node.target) in PRODUCTS and length not in own_sizes(operands):
            for read in node.all_input_nodes:
                assert shapes.get(read, ())[-2:] != (length, length), node.format_node()


def own_sizes(operands: dict[str, Any]) -> set[int]:
    """Sizes that are not lengths."""
    (batch, _, *k), v = operands["k"].shape, operands["v"].shape[2:]
    return {WIDTH, batch, *k, *v, math.prod(k), math.prod(v), v[0] * k[1]}


@pytest.mark.parametrize(
    "name", [pytest.param(LONGEST, marks=SLOW) if p.values[0] == LONGEST else p for p in sampled(FOUND, 8)]
)
def test_rewritten(name: str, recorded: Recorded) -> None:
    """Outputs and gradients are what they were, the region is gone, and level weights have a part in the result."""
    spelling = POSITIVE[name]
    model, inputs = spelling.make(), spelling.example(seed=1)
    before = gradients(model, model, inputs) if spelling.differentiable else (model(*inputs).detach(), {})
    check_said(name, llcompile.convert(model, *spelling.example(seed=2), verify=False))
    run = compiled(model, fullgraph=True)
    after = gradients(run, model, inputs)
    assert difference(after[0], before[0]) < 1e-4
    scale = max((float(g.abs().max()) for g in before[1].values()), default=0.0)
    for parameter, gradient in before[1].items():
        worst = float((after[1][parameter] - gradient).abs().max())
        assert worst <= 1e-4 * float(gradient.abs().max()) + 1e-5 * scale, parameter
    with torch.no_grad():
        operands = model.operands(*inputs)
        if name in STAYS:
            check_left(recorded.graphs[-1], spelling.length, operands)
        else:
            check_gone(recorded.graphs[-1], spelling.length, own_sizes(operands))
        small.perturb(model)
        assert difference(run(*inputs), before[0]) > 1e-4


WEIGHTED = (
    "tril of scores",
    "normalised by the sum of scores",
    "causal linear transformer",
    "ratio of cumulative products",
    "loop of GLA",
    "GLA in chunks",
    "delta by a triangular solve",
    "gated delta loop, [V, K] state",
    "KDA loop",
    "scan",
    "token loop with its projections",
    "delta cell, rows written in place",
    "chunk loop with its projections",
    "gated random features",
)


@pytest.mark.parametrize("name", sampled(WEIGHTED, 3))
def test_level_weights(name: str) -> None:
    """With random level weights: the layer whose mixer is replaced by the definition in float64."""
    spelling = POSITIVE[name]
    model, (x,) = spelling.make(), spelling.example(seed=1)
    one(llcompile.convert(model, x, verify=False))
    small.perturb(model)
    (weights,) = (m for m in model.modules() if isinstance(m, llcompile.LevelWeights))
    with torch.no_grad():
        mixed = expected(model.operands(x), weights(x))
        assert difference(compiled(model)(x), with_mixed(model, mixed, x)) < 1e-4
        assert difference(model(x), with_mixed(model, mixed, x)) > 1e-3, "the weights must matter"


def with_mixed(model: Mixer, mixed: Tensor, x: Tensor) -> Tensor:
    """The layer's output if its mixer's output were `mixed` [B, T, H * V], which is taken a call's tokens at a time."""
    rest = mixed

    def swap(_: nn.Module, args: tuple[Tensor]) -> Tensor:
        nonlocal rest
        piece, rest = rest.tensor_split([args[0].numel() // rest[:, 0].numel()], dim=1)
        return piece.reshape(args[0].shape).to(args[0].dtype)

    with torch.no_grad():
        handle = model.get_submodule(model.mixed_at).register_forward_pre_hook(swap)
        try:
            return model(x)
        finally:
            handle.remove()


LENGTHS = {
    "tril of scores": (7, 31, 64),
    "where over an arange mask": (11, 33),
    "SSD by segsum": (9, 40),
    "GLA by cumulative sums": (9, 40),
    "delta by a triangular solve": (5, 37),
    "chunks by reshape, exclusive cumsum": (16, 80),
    "SSD minimal, chunked": (32, 64),
    "scan": (9, 20),
    "chunk loop with an uneven end": (16, 45),
    "delta loop": (5, 9),
    "padded chunks, the layer ends before the cut": (8, 45),
    "doubling shifts": (9, 16),
}


@pytest.mark.parametrize("name", sampled(LENGTHS, 4))
def test_other_lengths(name: str) -> None:
    spelling = POSITIVE[name]
    model = spelling.make()
    one(llcompile.convert(model, *spelling.example(), verify=False))
    run = compiled(model)
    with torch.no_grad():
        for length in (*LENGTHS[name], spelling.length):
            inputs = spelling.example(length, batch=3)
            assert difference(run(*inputs), model(*inputs)) < 1e-4


# -- what is no mixer


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name: str) -> None:
    entry = NEGATIVE[name]
    assert look(name).converted == ()
    model, inputs = entry.make(), entry.example(seed=1)
    with torch.no_grad():
        assert torch.equal(compiled(model)(*inputs), model(*inputs))
    assert not any("loglinear" in parameter for parameter, _ in model.named_parameters())


@pytest.mark.parametrize("name", TWINS)
def test_twin_is_reported(name: str) -> None:
    """What looks like a mixer and is none is declined at the user's line, or named as what it is."""
    report = look(name)
    assert report.declined or report.untouched
    for declined in report.declined:
        assert "spellings" in declined.where
        assert declined.reason
        assert declined.hint


@pytest.mark.parametrize("name", sampled((n for n, entry in NEGATIVE.items() if "softmax" in entry.property), 1))
def test_softmax_attention_is_named(name: str) -> None:
    assert any("attention" in untouched.kind for untouched in look(name).untouched)


@pytest.mark.parametrize("name", sampled(EITHER, 4))
def test_disguised(name: str) -> None:
    """Found or not, the model computes what it did."""
    entry = EITHER[name]
    model, inputs = entry.make(), entry.example(seed=1)
    llcompile.convert(model, *entry.example())
    with torch.no_grad():
        assert difference(compiled(model)(*inputs), model(*inputs)) < 1e-4


# -- any layout, any model


@drawn.fixed(3)
@given(recipes(misses=True))
def test_some_layouts_left_alone(recipe: Recipe) -> None:
    check_left_alone(recipe)


@pytest.mark.slow
@drawn.fresh(8)
@given(recipes(misses=True))
def test_any_layout_left_alone(recipe: Recipe) -> None:
    check_left_alone(recipe)


def check_left_alone(recipe: Recipe) -> None:
    torch._dynamo.reset()
    model = seeded(Composed, recipe=recipe)()
    assert llcompile.inspect(model, *model.example(recipe.length)).converted == ()


def test_layers_of_a_model() -> None:
    """Each layer on its own, in the order of the model, with softmax attention between them."""
    layers = ("tril of scores", "loop of GLA", "scaled_dot_product_attention", "delta by a triangular solve")
    model = nn.Sequential(*((POSITIVE.get(name) or NEGATIVE[name]).make() for name in layers))
    inputs = POSITIVE["loop of GLA"].example()
    report = llcompile.convert(model, *inputs)
    assert [(c.module, c.decay, c.correction) for c in report.converted] == [
        ("0", "none", "none"),
        ("1", "channel", "none"),
        ("3", "none", "delta"),
    ]
    assert [(u.module, u.kind.split(" (")[0]) for u in report.untouched] == [("2", "softmax attention")]
    with torch.no_grad():
        assert difference(compiled(model)(*inputs), model(*inputs)) < 1e-4


@pytest.mark.slow
@drawn.fresh(25)
@given(recipes())
def test_any_layout(recipe: Recipe) -> None:
    torch._dynamo.reset()
    model = seeded(Composed, recipe=recipe)()
    inputs = model.example(recipe.length)
    found = one(llcompile.convert(model, *inputs))
    assert (found.decay, found.correction) == (recipe.decay, recipe.correction)
    assert (found.heads, found.key_dim, found.value_dim) == (recipe.heads, recipe.key_dim, recipe.value_dim)
    with torch.no_grad():
        assert difference(compiled(model)(*inputs), model(*inputs)) < 1e-4


@pytest.mark.parametrize("name", ["tril of scores", "ratio of cumulative products", "delta loop"])
def test_half_precision(name: str) -> None:
    spelling = POSITIVE[name]
    model = spelling.make().bfloat16()
    inputs = tuple(x.bfloat16() for x in spelling.example())
    found = one(llcompile.convert(model, *inputs, verify=False))
    assert (found.decay, found.correction) == (spelling.decay, spelling.correction)
    with torch.no_grad():
        run = compiled(model)(*inputs)
        assert run.dtype == torch.bfloat16
        assert difference(run, spelling.make()(*spelling.example())) < 5e-2


@pytest.mark.slow
def test_long_loop_is_recognised_in_seconds() -> None:
    """256 tokens, unrolled: at most 10 s on top of what Dynamo takes to trace it."""
    spelling = POSITIVE["loop with appended outputs"]
    inputs = spelling.example(256)
    start = time.perf_counter()
    with torch.no_grad():
        torch.compile(spelling.make(), backend="eager")(*inputs)
    traced = time.perf_counter()
    torch._dynamo.reset()
    one(llcompile.inspect(spelling.make(), *inputs))
    assert time.perf_counter() - traced < 10 + (traced - start)
