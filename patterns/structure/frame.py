"""Frame: the axes of some values, with one axis named as time."""

from __future__ import annotations

from collections.abc import Sequence

from llcompile.patterns.structure.axes import Atom, Axis
from llcompile.patterns.structure.follow import Followed

Row = tuple[Atom, ...]  # an axis as unsplit atoms


class Frame:
    """Followed axes, and which of them is time."""

    def __init__(self, followed: Followed, time: Axis) -> None:
        self.followed = followed
        self.leaves = followed.atoms.leaves(time)
        self._in_time = {id(leaf) for leaf in self.leaves}

    def axis_leaves(self, axis: Axis) -> Axis:
        """The axis as atoms that were never split."""
        return self.followed.atoms.leaves(axis)

    def is_time(self, atom: Atom) -> bool:
        """Whether an unsplit atom is time or a part of it."""
        return id(atom) in self._in_time

    def rows(self, axes: Sequence[Axis]) -> tuple[Row, ...]:
        """Axes as unsplit atoms."""
        return tuple(self.axis_leaves(axis) for axis in axes)
