"""A defect of llcompile's own, planted anywhere in recognition, fails a test and costs a user's program nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from llcompile.patterns.boundary import RAISE, CannotRun, NotKnown, boundary, called_back, running
from llcompile.patterns.graph.effects import Effects
from llcompile.patterns.graph.regions import Region
from llcompile.patterns.structure import certify, fit, memo, observations, probe, properties, record
from llcompile.patterns.structure.axis_rules.table import RULES
from llcompile.patterns.structure.find import find
from llcompile.patterns.structure.found import Findings

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier test has proved is looked at again."""
    monkeypatch.setattr(memo, "_answers", {})


class Linear(nn.Module):
    """Linear attention, or what is none."""

    def __init__(self, diagonal: int = 0) -> None:
        super().__init__()
        self.qkv, self.diagonal = nn.Linear(8, 24), diagonal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.mT).tril(self.diagonal) @ v


def graph_of(model: nn.Module) -> fx.GraphModule:
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    with torch.no_grad():
        torch.compile(model, backend=keep)(torch.randn(2, 16, 8))
    return graphs[0]


def looked(model: nn.Module) -> Findings:
    return find(Region(graph_of(model)))


def typo(error: type[Exception]) -> Callable[..., Any]:
    """What is called in the place of a function of ours that has a defect."""

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise error("planted")

    return failing


DEFECTS = [AttributeError, NameError, KeyError, TypeError, AssertionError, IndexError, ValueError, StopIteration]
# Where a defect is planted: in a rule, and in each step that handles exceptions.
PLACES = {
    "axis rule": lambda patch, broken: patch.setitem(RULES, "bmm", broken),
    "record": lambda patch, broken: patch.setattr(record._Recorder, "_append", broken),
    "probe": lambda patch, broken: patch.setattr(probe.Probe, "is_timed", broken),
    "operands": lambda patch, broken: patch.setattr(fit, "_axes", broken),
    "fit": lambda patch, broken: patch.setattr(fit, "_scaled", broken),
    "proof": lambda patch, broken: patch.setattr(certify, "_budget", broken),
}


@pytest.mark.parametrize("error", DEFECTS)
def test_a_typo_in_a_rule_fails_a_test(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "bmm", typo(error))
    with pytest.raises(error, match="planted"):
        looked(Linear())


@pytest.mark.parametrize("place", PLACES)
def test_a_typo_anywhere_fails_a_test(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLACES[place](monkeypatch, typo(KeyError))
    with pytest.raises(KeyError, match="planted"):
        looked(Linear())


@pytest.mark.parametrize("place", PLACES)
def test_a_typo_ends_no_program(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RAISE, "0")
    graph = graph_of(Linear())
    PLACES[place](monkeypatch, typo(KeyError))
    with boundary("a graph"):  # as passes/recognise.py has it
        find(Region(graph))


@pytest.mark.parametrize(("broken", "diagonal"), [("reach", 1), ("is_additive", 1)])
def test_a_typo_in_what_is_measured_of_a_near_miss_fails_a_test(
    broken: str, diagonal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observations.Observations, broken, typo(TypeError))
    with pytest.raises(TypeError, match="planted"):
        looked(Linear(diagonal))


def test_a_typo_in_a_property_fails_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(properties, "PROPERTIES", (properties.Property(typo(NameError)),))
    with pytest.raises(NameError, match="planted"):
        looked(Linear(diagonal=1))


def test_a_typo_in_what_nodes_write_fails_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(Linear())
    monkeypatch.setattr("llcompile.patterns.graph.effects._OnMeta._note", typo(AttributeError))
    with pytest.raises(AttributeError, match="planted"):
        Effects(graph, graph.graph)


def test_what_is_not_known_is_no_defect() -> None:
    with boundary("a question", NotKnown) as outcome:
        raise NotKnown("on purpose")
    assert outcome.failed


def test_what_the_program_raises_is_no_defect() -> None:
    with pytest.raises(CannotRun) as caught, running("an operation"):
        torch.zeros(2) + torch.zeros(3)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_what_the_program_calls_back_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError), running("an operation"), called_back():
        raise KeyError("planted")
    monkeypatch.setenv(RAISE, "")
    with pytest.raises(CannotRun), running("an operation"), called_back():
        raise KeyError("planted")
