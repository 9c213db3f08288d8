"""Sizing: a part of a program at other sizes than it was traced with, and tensors brought from axes to axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llcompile.patterns.structure.axes import Atom
from llcompile.patterns.structure.cut import Part
from llcompile.patterns.structure.frame import Frame, Row
from llcompile.patterns.structure.program import Value

_SMALL = (3, 5, 4, 6, 7)
_SHORT = 4  # axes up to this size stay


class CannotArrange(Exception):
    """The axes of a tensor are not made of those that are asked for."""


@dataclass
class Sizing:
    """How long each unsplit atom is to be."""

    times: Frame
    sizes: dict[int, int] = field(default_factory=dict)

    def of(self, leaf: Atom) -> int:
        """The size of an unsplit atom."""
        return self.sizes.get(id(leaf), leaf.size)

    @property
    def length(self) -> int:
        """The number of positions."""
        return math.prod(self.of(leaf) for leaf in self.times.leaves)

    def shape(self, value: Value) -> tuple[int, ...]:
        """The shape of a value."""
        axes = self.times.followed.axes[value]
        return tuple(math.prod(self.of(leaf) for leaf in self.times.axis_leaves(axis)) for axis in axes)


def small(times: Frame, part: Part, keep_time: bool, variant: int = 0) -> Sizing:
    """Sizes as small as the part allows: an axis along which positions are named by number keeps its size."""
    sizing, number = Sizing(times), variant
    for value in dict.fromkeys(v for op in part.ops for v in (*op.inputs, *op.outputs)):
        for axis in times.followed.axes[value]:
            for leaf in times.axis_leaves(axis):
                if id(leaf) in sizing.sizes:
                    continue
                whole = times.is_time(leaf) and len(times.leaves) == 1
                # A sequence of two or three tokens shows too little of what a part does with the past.
                short = leaf.size <= _SHORT and not whole
                keep = leaf.pinned or short or (keep_time and times.is_time(leaf))
                sizing.sizes[id(leaf)] = leaf.size if keep else 11 + 6 * variant if whole else _SMALL[number % 5]
                number += not keep
    return sizing


def arrange(
    x: Any, axes: Sequence[Row], groups: Sequence[Row], size: Callable[[Atom], Any], broadcast: bool = False
) -> Any:
    """A tensor (or proxy) with the given axes, with one axis for each group of atoms.

    Args:
        x: the tensor.
        axes: its axes.
        groups: the axes asked for.
        size: the size of an atom: a number, or a proxy for one.
        broadcast: leave size one where the tensor does not have an atom; else it is expanded.

    Raises:
        CannotArrange: the tensor has an atom that no group has, or one twice.
    """
    flat = [atom for axis in axes for atom in axis]
    wanted = [atom for group in groups for atom in group]
    if len(set(map(id, flat))) != len(flat) or not {id(a) for a in flat} <= {id(a) for a in wanted}:
        raise CannotArrange
    if any(len(axis) != 1 for axis in axes):
        x = x.reshape([size(atom) for atom in flat])
    present = [atom for atom in wanted if any(atom is a for a in flat)]
    order = [next(i for i, a in enumerate(flat) if a is atom) for atom in present]
    if order != list(range(len(order))):
        x = x.permute(order)
    missing = [i for i, atom in enumerate(wanted) if not any(atom is a for a in flat)]
    for i in missing:
        x = x.unsqueeze(i)
    if broadcast:
        if any(len(group) > 1 for group in groups):
            sizes = iter([1 if i in missing else size(atom) for i, atom in enumerate(wanted)])
            x = x.reshape([math.prod(next(sizes) for _ in group) for group in groups])
        elif any(not group for group in groups):
            x = _with_ones(x, groups)
        return x
    if missing:
        x = x.expand([size(atom) if i in missing else -1 for i, atom in enumerate(wanted)])
    if all(len(group) <= 1 for group in groups):
        return _with_ones(x, groups)
    return x.reshape([_product([size(atom) for atom in group]) for group in groups])


def _with_ones(x: Any, groups: Sequence[Row]) -> Any:
    for i, group in enumerate(groups):
        if not group:
            x = x.unsqueeze(i)
    return x


def _product(factors: list[Any]) -> Any:
    made: Any = 1
    for factor in factors:
        made = factor if isinstance(made, int) and made == 1 else made * factor
    return made
