"""What is read off a recorded program again and again, found out once in one sweep."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from math import prod
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from llcompile.patterns.graph.regions import Region
from llcompile.patterns.graph.walk import walk
from llcompile.patterns.mechanisms.times import Times
from llcompile.patterns.mechanisms.vocabulary import PRODUCTS, WEIGHTS, called
from llcompile.patterns.structure.follow import follow_program
from llcompile.patterns.structure.program import Program, Value

Stop = Callable[[Value], bool]


class Facts:
    """One region's program.

    Args:
        region: the region.
        program: its graph as operations on values.

    Attributes:
        position: of each value in the program's order.
        names: what computes each value; for a call that stays whole the name of what is called, "" for an input.
        activations: values that depend on what the model is given.
        learned: values that depend on parameters and on nothing that the model is given.
    """

    def __init__(self, region: Region, program: Program) -> None:
        self.region, self.program = region, program
        self.position: dict[Value, int] = {}
        self.names: dict[Value, str] = {}
        self.activations: set[Value] = set()
        self.learned: set[Value] = set()
        for position, value in enumerate(program.values()):
            self.position[value] = position
            self.names[value] = _name(value)
            if value.op is None:
                self._enter(value)
            elif not self.activations.isdisjoint(value.op.inputs):
                self.activations.add(value)
            elif not self.learned.isdisjoint(value.op.inputs):
                self.learned.add(value)

    def _enter(self, value: Value) -> None:
        given = value.node is not None and value.node.op == "placeholder"
        name = self.region.outer(value.node).name if value.node is not None else ""
        if value.parameter or "_parameters_" in name:
            self.learned.add(value)
        elif given and value.data is None and "_buffers_" not in name:
            self.activations.add(value)

    @property
    def values(self) -> Iterable[Value]:
        """The values in the program's order."""
        return self.position

    @functools.cached_property
    def times(self) -> Times:
        """Which axes are time."""
        modes = _disable_current_modes(), torch._C.DisableTorchFunction()
        with modes[0], modes[1], torch.no_grad(), torch.autocast("cpu", enabled=False):
            return Times(self.program, follow_program(self.program), self.activations)

    def inputs(self, value: Value) -> list[Value]:
        """What the value is computed from."""
        return [] if value.op is None else value.op.inputs

    def users(self, value: Value) -> list[Value]:
        """What is computed from the value."""
        return [made for op in value.users for made in op.outputs if made in self.position]

    def size(self, value: Value) -> int:
        """How many numbers a value has."""
        return prod(value.shape)

    def factors(self, value: Value) -> tuple[Value, Value] | None:
        """The two tensors that both depend on the input and that are multiplied and summed over an axis."""
        name, operands = self.names[value], self.inputs(value)
        if name == "sum":  # of broadcast tensors
            operands = [factor for v in operands if self.names[v] == "mul" for factor in self.inputs(v)]
        elif name not in PRODUCTS:
            return None
        operands = operands[-2:]
        return (operands[0], operands[1]) if len(operands) == 2 and self.activations.issuperset(operands) else None

    def projected(self, value: Value) -> tuple[Value, Value] | None:
        """The tensor and the weights of a projection: they are multiplied and summed over an axis."""
        name, operands = self.names[value], self.inputs(value)
        if name not in WEIGHTS or len(operands) < 2:
            return None
        first, second = operands[-2:] if name in PRODUCTS else operands[:2]
        if (first in self.activations) == (second in self.activations):
            return None
        return (first, second) if first in self.activations else (second, first)

    def ends(self, value: Value) -> bool:
        """Where a mechanism's inside ends: a projection, or a product of two activations."""
        return self.projected(value) is not None or self.factors(value) is not None

    def is_projection(self, value: Value) -> bool:
        """Where a walk that looks for one mechanism would get into the next one."""
        return self.projected(value) is not None

    def is_linear(self, value: Value) -> bool:
        """Whether it is a projection by a matrix."""
        return self.names[value] in PRODUCTS and self.is_projection(value)

    def above(self, value: Value, stop: Stop, reach: int = 96) -> Iterator[Value]:
        """What the value is computed from, the nearest first, not beyond a value at which to stop; itself included."""
        onward = lambda v: () if v is not value and stop(v) else self.inputs(v)  # noqa: E731
        return islice(walk((value,), onward), reach)

    def below(self, value: Value, stop: Stop, reach: int = 96) -> Iterator[Value]:
        """What is computed from the value, the nearest first, not beyond a value at which to stop; itself included."""
        onward = lambda v: () if v is not value and stop(v) else self.users(v)  # noqa: E731
        return islice(walk((value,), onward), reach)

    def given(self, value: Value) -> Value:
        """The result of the graph's node that a value is a layout of, made inside of the node that reads it."""
        while value.node is None and len(self.inputs(value)) == 1:
            value = self.inputs(value)[0]
        return value

    def argument(self, node: fx.Node, position: int, name: str) -> Any:
        """An argument of a node; for a tensor the value that it has there."""
        found = node.args[position] if len(node.args) > position else node.kwargs.get(name)
        return self.program.reads.get((node, found), found) if isinstance(found, fx.Node) else found


def node_of(value: Value) -> fx.Node:
    """The graph's node whose call computes the value, or that it is an input of."""
    node = value.node if value.op is None else value.op.node
    assert node is not None
    return node


def _name(value: Value) -> str:
    if value.op is None:
        return ""
    return called(value.op.node) if value.op.name == "opaque" else value.op.name.removesuffix("_")
