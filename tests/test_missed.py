"""Level weights that a compiled call does not read are an error, or a warning; and no wrapper hides that."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import llcompile
from llcompile import backend
from llcompile.errors import LevelWeightsIgnoredWarning, MissedLevelWeightsError, OptionError, WrappedBackendError
from llcompile.weights import attachment
from tests.helpers.block import (
    EAGER,
    Block,
    Mixer,
    anything,
    compiled,
    converted,
    difference,
    inputs,
    perturb,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Plain(nn.Module):
    """Nothing that mixes positions."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).relu()


def with_levels(module: nn.Module) -> nn.Module:
    attachment.attach(module, "loglinear", llcompile.LevelWeights("static", 1, 4))
    return module


def told(run: Callable[[], Any], kind: type[Warning] = LevelWeightsIgnoredWarning) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if issubclass(w.category, kind)]


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_a_module_that_ran_and_is_not_read(root: bool, trained: bool) -> None:
    """Whatever the value of the level weights, and also where the frame is the module's own."""
    owner = with_levels(Plain())
    if trained:
        perturb(weights_of(owner))
    model = owner if root else nn.Sequential(nn.Identity(), owner)
    with pytest.raises(MissedLevelWeightsError, match=r"Plain.*\(loglinear\) and ran in this call.*does not read them"):
        compiled(model)(inputs())
    torch._dynamo.reset()
    run = compiled(model, on_miss="warn")
    want = owner.up(inputs()).relu()
    assert len(told(lambda: run(inputs()))) >= 1
    assert torch.equal(run(inputs()), want)


def test_no_miss() -> None:
    """A module that does not run in the call, one whose mixer acts, and level weights that are switched off."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = with_levels(Plain()), Mixer()

        def forward(self, x: Tensor, left: bool = False) -> Tensor:
            return self.left(x) if left else self.right(x)

    model = Sometimes()
    llcompile.convert(model, inputs())
    assert told(lambda: compiled(model)(inputs())) == []
    with pytest.raises(MissedLevelWeightsError, match="Plain 'left'"):
        compiled(model)(inputs(), left=True)
    torch._dynamo.reset()
    assert told(lambda: compiled(model, level_weights="none")(inputs())) == []


def test_a_mixer_that_is_none_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted()
    compiled(model)(inputs())  # the control
    torch._dynamo.reset()
    monkeypatch.setattr(Mixer, "forward", lambda self, x: x * self.qkv.weight[0])
    with pytest.raises(MissedLevelWeightsError, match=r"Mixer 'mixer'.*no linear-time mixer of this module was found"):
        compiled(model)(inputs())


class Pair(nn.Module):
    """Two mixers in one forward; the first is none in training, or does not run there."""

    def __init__(self, runs: bool) -> None:
        super().__init__()
        self.runs, self.first, self.second = runs, nn.Linear(8, 24), nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        if self.runs or not self.training:
            q, k, v = self.first(x).chunk(3, -1)
            x = x + torch.dropout((q @ k.mT).tril(), 0.5, self.training) @ v
        q, k, v = self.second(x).chunk(3, -1)
        return x + (q @ k.mT).tril() @ v


@pytest.mark.parametrize("runs", [True, False])
def test_one_of_two_mixers(runs: bool) -> None:
    """Level weights are missed where the code of their mixer ran, and not where it did not."""
    model = Pair(runs).eval()
    report = llcompile.convert(model, inputs(), verify=False)  # which would look at it in training, too
    assert len(report.converted) == 2
    run = compiled(model)
    assert told(lambda: run(inputs())) == []  # the control
    model.train()
    if runs:
        with pytest.raises(MissedLevelWeightsError, match=r"Pair has level weights \(loglinear\)"):
            run(inputs())
    else:
        assert told(lambda: run(inputs())) == []


def test_the_option() -> None:
    with pytest.raises(OptionError, match="on_miss"):
        compiled(Plain(), on_miss="ignore")


def test_what_dynamo_leaves_out_is_said() -> None:
    """A function that Dynamo skips in a compiled call runs as it is, and level weights of 1 are no excuse."""
    model = converted()
    assert told(lambda: model(inputs())) == []  # eagerly, nobody asked for more
    model.mixer.forward = torch.compiler.disable(model.mixer.forward)
    run = compiled(model)
    found = told(lambda: run(inputs()))
    assert found
    assert "Mixer has level weights and ran in a compiled call, but no compiled graph read them" in found[0]
    assert told(lambda: compiled(model, level_weights="none")(inputs())) == []


class Noted(Mixer):
    """Takes keywords that it has no use for, behind a decorator: each set of them is a graph of its own."""

    @anything
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return super().forward(x)


def test_kinds_of_calls_have_room() -> None:
    """More sets of keywords than Dynamo's limit of graphs for one function: the level weights act in all of them."""
    with torch._dynamo.config.patch(recompile_limit=2):
        model, x = converted(Noted), inputs()
        perturb(weights_of(model))
        run = compiled(model)
        want = run(x)
        for names in ("a", "ab", "abc", "abcd"):
            out: list[Tensor] = []
            assert told(lambda names=names, out=out: out.append(run(x, **dict.fromkeys(names, 1)))) == []
            assert difference(out[0], want) < 1e-6


def test_a_limit_of_graphs_that_is_met_is_said() -> None:
    """Where Dynamo gives up after all, its eager run of the code is said at once."""
    model, x = converted(Block), inputs()
    run = compiled(model)
    run(x)
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        found = told(lambda: run(x[:, :7]))
    assert any("torch._dynamo.config.recompile_limit" in message for message in found)


# -- wrapped backends


def by_lambda() -> Any:
    return lambda graph, values: backend.loglinear(graph, values, options=EAGER)


def by_method() -> Any:
    class Compiler:
        def run(self, graph: fx.GraphModule, values: list[Any]) -> Any:
            return torch._dynamo.lookup_backend("loglinear")(graph, values, options=EAGER)

    return Compiler().run


def by_object() -> Any:
    class Compiler:
        def __call__(self, graph: fx.GraphModule, values: list[Any]) -> Any:
            return backend.loglinear(graph, values, options=EAGER)

    return Compiler()


def by_partials() -> Any:
    return functools.partial(functools.partial(backend.loglinear, mode=None), options=EAGER)


def by_copy() -> Any:
    """As a pass of the user's own does that makes another graph."""

    def compile_copy(graph: fx.GraphModule, values: list[Any]) -> Any:
        return backend.loglinear(copy.deepcopy(graph), values, options=EAGER)

    return compile_copy


@pytest.mark.parametrize("wrap", [by_lambda, by_method, by_object, by_partials, by_copy])
def test_wrappers_that_call_us(wrap: Callable[[], Any]) -> None:
    """They are not taken for another backend: nothing is said, and the level weights act."""
    model, x = converted(), inputs()
    run = torch.compile(model, backend=wrap())
    assert told(lambda: run(x)) == []
    before = run(x).detach()
    perturb(weights_of(model))
    after = run(x)
    assert difference(after, before) > 1e-3
    assert difference(after, compiled(model)(x)) < 1e-6
    after.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in weights_of(model))


@pytest.mark.parametrize("name", ["eager", "a lambda", "a partial", "one that fails over"])
def test_wrappers_of_others(name: str) -> None:
    """They are not taken for ours: no node of ours is in their graph, and the level weights are said to do nothing."""
    graphs: list[str] = []

    def plain(graph: fx.GraphModule, values: list[Any]) -> Any:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    def fails_over(graph: fx.GraphModule, values: list[Any]) -> Any:
        try:
            return backend.loglinear(graph, values, options=EAGER)
        except Exception:  # the user's own
            return plain(graph, values)

    kinds = {
        "eager": "eager",
        "a lambda": lambda graph, values: plain(graph, values),
        "a partial": functools.partial(plain),
        "one that fails over": fails_over,
    }
    model, x = converted(), inputs()
    perturb(weights_of(model))
    run = torch.compile(model, backend=kinds[name])
    assert any("another backend" in message for message in told(lambda: run(x)))
    assert torch.equal(run(x), Block.forward(model, x))
    assert not any("mark" in graph for graph in graphs)


def test_a_piece_of_a_graph_is_refused() -> None:
    """A wrapper that hands over a copy of a graph in which nothing of ours was traced cannot be served."""
    run = torch.compile(Plain(), backend=by_copy())
    with pytest.raises(WrappedBackendError, match="a part or a copy of the graph"):
        run(inputs())
