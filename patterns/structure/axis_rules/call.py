"""Call: one operation as its axis rule sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from llcompile.patterns.structure.axes import Axes, Axis, Dims, length
from llcompile.patterns.structure.program import Op, Value


@dataclass
class Call:
    """One operation as its rule sees it.

    Args:
        op: the operation.
        dims: all dims.
        axes: value -> its axes, so far.
        lost: value -> axes that its history has cut to pieces; pieces put together to that size are it again.
        mixed: what the rule notes: axes that the operation mixes.
    """

    op: Op
    dims: Dims
    axes: dict[Value, Axes]
    lost: dict[Value, tuple[Axis, ...]]
    mixed: list[Axis] = field(default_factory=list)

    def __post_init__(self) -> None:
        schema = self.op.target._schema.arguments if isinstance(self.op.target, torch._ops.OpOverload) else ()
        self.given = {a.name: self.op.args[i] for i, a in enumerate(schema) if i < len(self.op.args)}
        self.given |= self.op.kwargs
        self.defaults = {a.name: a.default_value for a in schema if a.has_default_value()}

    def arg(self, name: str) -> Any:
        """An argument by its name in the schema, or its default."""
        return self.given.get(name, self.defaults.get(name))

    def of(self, name: str) -> Axes:
        """The axes of a tensor argument."""
        return self.axes[self.arg(name)]

    @property
    def first(self) -> Value:
        """The first tensor argument."""
        return self.op.inputs[0]

    def dim(self, name: str = "dim", rank: int | None = None) -> int:
        """A dimension argument, counted from the front."""
        return int(self.arg(name)) % max(1, len(self.first.shape) if rank is None else rank)

    def new(self, index: int = 0) -> Axes:
        """New axes for a result."""
        return tuple(self.dims.new(n) for n in self.op.outputs[index].shape)

    def repeated(self, size: int) -> Axis:
        """A new axis along which all numbers are the same."""
        made = self.dims.new(size)
        for dim in made:
            dim.repeated = True
        return made

    def mix(self, *axes: Axis) -> None:
        """Notes axes that are mixed."""
        self.mixed.extend(a for a in axes if a)

    def pair(self, first: Axis, second: Axis) -> Axis:
        """The axis of two operands that run together (one may be of size one)."""
        if not first or not second:
            return first or second
        self.dims.same(first, second)
        return first

    def cut(self, value: Value, position: int) -> None:
        """Notes that pieces are taken out of one axis of a tensor, and which others stand beside it."""
        axes = self.axes[value]
        self.mix(axes[position])
        if axes[position]:
            self.dims.beside.setdefault(axes[position], set()).update(
                a for i, a in enumerate(axes) if a and i != position
            )

    def wholes(self, piece: Value, size: int, *along: Axis) -> list[Axis]:
        """The axes of this size that a piece was cut from, and that its axes `along` may be pieces of."""
        lost = self.lost.get(piece, ())
        found = [a for a in lost if size_of(self.dims, a) == size]
        if not found and along and along[0]:
            found = [a for a in (self.dims.chunked(a, along[0]) for a in lost) if size_of(self.dims, a) == size]
        return [a for a in found if all(self.dims.is_piece(axis, a) for axis in along)]

    def assembled(self, size: int, pieces: Mapping[Value, Axis]) -> Axis:
        """A new axis put together from pieces along an axis of each; the one they were cut from, where its size says
        so."""
        made = self.dims.new(size)
        for dim in made:
            dim.assembled = True
        found = [a for piece, axis in pieces.items() for a in self.wholes(piece, size, axis)]
        # Features that were put together on the way are no whole that anything was cut from.
        found = [a for a in found if self.dims.is_cut(a)] or found
        if found and all(self.dims.leaves(a) == self.dims.leaves(found[0]) for a in found):
            self.dims.same(made, found[0])
        return made


def size_of(dims: Dims, axis: Axis) -> int:
    """How many positions an axis has."""
    return length(dims.leaves(axis))


def pin(c: Call, axis: Axis) -> None:
    """Notes that the graph is written for this axis' size."""
    for leaf in c.dims.leaves(axis):
        leaf.pinned = True


Rule = Callable[[Call], list[Axes]]
Rules = tuple[tuple[Rule, str], ...]
