"""Asking while Dynamo compiles: of each graph that a backend is handed, or in the middle of the traced code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn


class Asking:
    """A backend that is asked about each graph and runs it as it is."""

    def __init__(self, question: Callable[[fx.GraphModule], Any] = lambda module: None) -> None:
        self.question = question
        self.answers: list[Any] = []

    def __call__(self, module: fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
        self.answers.append(self.question(module))
        return module.forward

    @property
    def count(self) -> int:
        """How many graphs it was handed."""
        return len(self.answers)


def ask_of_graphs(
    question: Callable[[fx.GraphModule], Any], function: Callable[..., Any], *args: Any, **given: Any
) -> list[Any]:
    """What was answered for each graph of `function(*args)`, compiled with what else is given."""
    asking = Asking(question)
    torch.compile(function, backend=asking, **given)(*args)
    return asking.answers


def asked_while_traced(question: Callable[[], Any]) -> tuple[Callable[[], int], list[Any]]:
    """A function that traced code calls to have something asked there (its result is 0), and the answers."""
    answers: list[Any] = []

    @torch._dynamo.assume_constant_result
    def ask() -> int:
        answers.append(question())
        return 0

    return ask, answers


class Scale(nn.Module):
    """Multiplies by a parameter; holds a buffer and a plain tensor, too."""

    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), value))
        self.unread = nn.Parameter(torch.full((3,), 5.0))
        self.register_buffer("table", torch.arange(3.0))
        self.constant = torch.ones(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Layers(nn.Module):
    """Two of these, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Scale(), Scale()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def node_of(module: fx.GraphModule, name: str) -> fx.Node:
    """The first node of a graph that calls a function or method of this name."""

    def named(node: fx.Node) -> str:
        return str(getattr(node.target, "__name__", node.target)).split(".")[0]

    return next(node for node in module.graph.nodes if node.op.startswith("call_") and named(node) == name)
