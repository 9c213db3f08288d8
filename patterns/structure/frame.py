"""Frame: the axes of some values, with one axis named as time."""

from __future__ import annotations

from collections.abc import Sequence

from llcompile.patterns.structure.axes import Axes, Axis, Dim
from llcompile.patterns.structure.follow import Followed


class Frame:
    """Followed axes, and which of them is time."""

    def __init__(self, followed: Followed, time: Axis) -> None:
        self.followed = followed
        self.leaves = followed.dims.leaves(time)
        self._in_time = {id(leaf) for leaf in self.leaves}

    def axis_leaves(self, axis: Axis) -> Axis:
        """The axis as dims that were never split."""
        return self.followed.dims.leaves(axis)

    def is_time(self, dim: Dim) -> bool:
        """Whether an unsplit dim is time or a part of it."""
        return id(dim) in self._in_time

    def rows(self, axes: Sequence[Axis]) -> Axes:
        """Axes as unsplit dims."""
        return tuple(self.axis_leaves(axis) for axis in axes)
