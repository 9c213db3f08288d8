"""Frame: the axes of some values, with one axis named as time."""

from __future__ import annotations

from collections.abc import Iterable

from llcompile.patterns.structure.axes import Axes, Axis, Dim
from llcompile.patterns.structure.follow import Followed
from llcompile.patterns.structure.program import Value


class Frame:
    """Followed axes, and which of them is time."""

    def __init__(self, followed: Followed, time: Axis) -> None:
        self.followed = followed
        self.leaves = followed.dims.leaves(time)
        self._in_time = frozenset(self.leaves)

    def axis_leaves(self, axis: Axis) -> Axis:
        """The axis as dims that were never split."""
        return self.followed.dims.leaves(axis)

    def is_time(self, dim: Dim) -> bool:
        """Whether an unsplit dim is time or a part of it."""
        return dim in self._in_time

    def unsplit(self, axes: Iterable[Axis]) -> Axes:
        """Axes as unsplit dims."""
        return tuple(map(self.axis_leaves, axes))

    def axes(self, value: Value) -> Axes:
        """The axes of a value as unsplit dims."""
        return self.unsplit(self.followed.axes[value])
