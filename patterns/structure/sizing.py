"""Sizing: a subgraph of a program at other sizes than it was traced with, and tensors brought from axes to axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llcompile.patterns.boundary import NotKnown
from llcompile.patterns.structure.axes import Axis, Dim
from llcompile.patterns.structure.cut import Subgraph
from llcompile.patterns.structure.frame import Frame
from llcompile.patterns.structure.program import Value

_SMALL = (3, 5, 4, 6, 7)
_SHORT = 4  # axes up to this size stay


class CannotArrange(NotKnown):
    """The axes of a tensor are not made of those that are asked for."""


@dataclass
class Sizing:
    """How long each unsplit dim is to be."""

    analysis: Frame
    sizes: dict[Dim, int] = field(default_factory=dict)

    def of(self, leaf: Dim) -> int:
        """The size of an unsplit dim."""
        return self.sizes.get(leaf, leaf.size)

    @property
    def length(self) -> int:
        """The number of positions."""
        return math.prod(self.of(leaf) for leaf in self.analysis.leaves)

    def shape(self, value: Value) -> tuple[int, ...]:
        """The shape of a value."""
        return tuple(math.prod(map(self.of, axis)) for axis in self.analysis.axes(value))


def small(analysis: Frame, subgraph: Subgraph, keep_time: bool, variant: int = 0) -> Sizing:
    """Sizes as small as the subgraph allows: an axis along which positions are named by number keeps its size."""
    sizing, number = Sizing(analysis), variant
    for value in dict.fromkeys(v for op in subgraph.ops for v in (*op.inputs, *op.outputs)):
        for axis in analysis.axes(value):
            for leaf in axis:
                if leaf in sizing.sizes:
                    continue
                whole = analysis.is_time(leaf) and len(analysis.leaves) == 1
                # A sequence of two or three tokens shows too little of what a subgraph does with the past.
                short = leaf.size <= _SHORT and not whole
                keep = leaf.pinned or short or (keep_time and analysis.is_time(leaf))
                sizing.sizes[leaf] = leaf.size if keep else 11 + 6 * variant if whole else _SMALL[number % 5]
                number += not keep
    return sizing


def arrange(
    x: Any, axes: Sequence[Axis], groups: Sequence[Axis], size: Callable[[Dim], Any], broadcast: bool = False
) -> Any:
    """A tensor (or proxy) with the given axes, with one axis for each group of dims.

    Args:
        x: the tensor.
        axes: its axes.
        groups: the axes asked for.
        size: the size of a dim: a number, or a proxy for one.
        broadcast: leave size one where the tensor does not have a dim; else it is expanded.

    Raises:
        CannotArrange: the tensor has a dim that no group has, or one twice.
    """
    flat = [dim for axis in axes for dim in axis]
    wanted = [dim for group in groups for dim in group]
    if len({*flat}) != len(flat) or not {*flat} <= {*wanted}:
        raise CannotArrange
    missing = {*wanted} - {*flat}
    if any(len(axis) != 1 for axis in axes):
        x = x.reshape([size(dim) for dim in flat])
    x = _in_order(x, [flat.index(dim) for dim in wanted if dim not in missing])
    for i, dim in enumerate(wanted):
        if dim in missing:
            x = x.unsqueeze(i)
    if broadcast:
        return _grouped(x, groups, lambda dim: 1 if dim in missing else size(dim))
    if missing:
        x = x.expand([size(dim) if dim in missing else -1 for dim in wanted])
    return _grouped(x, groups, size)


def _in_order(x: Any, order: list[int]) -> Any:
    return x if order == list(range(len(order))) else x.permute(order)


def _grouped(x: Any, groups: Sequence[Axis], size: Callable[[Dim], Any]) -> Any:
    """A tensor with an axis for each dim, with one for each group."""
    if any(len(group) > 1 for group in groups):
        return x.reshape([_product([size(dim) for dim in group]) for group in groups])
    for i, group in enumerate(groups):
        if not group:
            x = x.unsqueeze(i)
    return x


def _product(factors: list[Any]) -> Any:
    made: Any = 1
    for factor in factors:
        made = factor if isinstance(made, int) and made == 1 else made * factor
    return made
