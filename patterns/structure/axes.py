"""Axes: follows every axis through the program, so that it is known which one is time, a head, a feature.

An axis of a value is a tuple of dims, outermost first: `[B*T, H*K]` has the axes `(b, t)` and `(h, k)`. Operations that
pair axes element by element make their dims the same; a reshape that cuts an axis splits its dim, for all values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Dim:
    """An axis that is not made of others, or was not when it came up.

    Args:
        size: how many positions.
        parent: the dim that this one was found to be the same as.
        parts: the two dims, outer and inner, that it was split into.
        pinned: operations speak of positions along it by number (slices, constants), so it has no other size.
        weight: a parameter of the model has it: a feature, a head, or a table of positions.
        feature: a weight is summed over it, or makes it.
        assembled: it was put together from pieces.
        gathered: these are features, laid side by side.
        repeated: a tensor was repeated along it, and nothing has it that differs along it.
    """

    size: int
    parent: Dim | None = None
    parts: tuple[Dim, Dim] | None = None
    whole: Dim | None = None
    pinned: bool = False
    weight: bool = False
    feature: bool = False
    assembled: bool = False
    gathered: bool = False
    repeated: bool = False
    number: int = 0

    def __repr__(self) -> str:
        return f"a{self.number}:{self.size}"


Axis = tuple[Dim, ...]  # () for an axis of size one
Axes = tuple[Axis, ...]


def length(axis: Axis) -> int:
    """How many positions an axis has."""
    return math.prod(dim.size for dim in axis)


def dims_of(axes: Iterable[Axis]) -> set[Dim]:
    """All dims of some axes."""
    return {dim for axis in axes for dim in axis}


def shared(held: Sequence[set[Dim]]) -> set[Dim]:
    """What at least two of the sets have."""
    return {dim for i, one in enumerate(held) for two in held[:i] for dim in one & two}


@dataclass
class Dims:
    """All dims of a program."""

    made: list[Dim] = field(default_factory=list)
    slices: dict[tuple[tuple[Dim, ...], int, int, int], Dim] = field(default_factory=dict)
    pads: dict[tuple[tuple[Dim, ...], int], Dim] = field(default_factory=dict)
    joined: set[Axis] = field(default_factory=set)  # axes that were laid end to end with others
    beside: dict[Axis, set[Axis]] = field(default_factory=dict)  # axis that was cut -> the others of its tensors

    def new(self, size: int) -> Axis:
        """A new axis of the given size."""
        if size == 1:
            return ()
        dim = Dim(size, number=len(self.made))
        self.made.append(dim)
        return (dim,)

    def find(self, dim: Dim) -> Dim:
        """The dim that stands for all those that are the same as this one."""
        while dim.parent is not None:
            if dim.parent.parent is not None:
                dim.parent = dim.parent.parent
            dim = dim.parent
        return dim

    def leaves(self, axis: Axis) -> Axis:
        """The axis as dims that were never split."""
        if all(dim.parent is None and dim.parts is None for dim in axis):
            return axis
        return tuple(leaf for dim in axis for leaf in self._leaves(self.find(dim)))

    def _leaves(self, dim: Dim) -> Iterator[Dim]:
        if dim.parts is None:
            yield dim
        else:
            for part in dim.parts:
                yield from self._leaves(self.find(part))

    def root(self, dim: Dim) -> Dim:
        """The dim that this one was split from."""
        dim = self.find(dim)
        while dim.whole is not None:
            dim = self.find(dim.whole)
        return dim

    def same(self, first: Axis, second: Axis) -> bool:
        """Notes that two axes pair element by element; False where their sizes do not allow it."""
        one, two = list(self.leaves(first)), list(self.leaves(second))
        while one and two:
            a, b = self.find(one.pop(0)), self.find(two.pop(0))
            if a is b:
                continue
            if a.size == b.size:
                self._join(a, b)
                continue
            small, large = (a, b) if a.size < b.size else (b, a)
            if large.size % small.size or not self.split(large, small.size):
                return False
            assert large.parts is not None
            rest = list(self.leaves(large.parts[1:]))
            (two if large is b else one)[:0] = rest
            outer = self.leaves(large.parts[:1])
            if len(outer) != 1 or not self._join_sized(small, outer[0]):
                return False
        return not one and not two

    def _join_sized(self, a: Dim, b: Dim) -> bool:
        a, b = self.find(a), self.find(b)
        if a is not b and a.size == b.size:
            self._join(a, b)
        return a.size == b.size

    def _join(self, a: Dim, b: Dim) -> None:
        if a.whole is None and b.whole is not None:
            a, b = b, a  # the one that is a part of something stays
        b.parent = a
        a.pinned |= b.pinned
        a.weight |= b.weight
        a.feature |= b.feature
        a.repeated &= b.repeated

    def split(self, dim: Dim, outer: int) -> bool:
        """Splits a dim that has no parts into an outer one of the given size and the rest."""
        dim = self.find(dim)
        if dim.parts is not None or dim.size % outer or outer in (1, dim.size):
            return False
        parts = self.new(outer) + self.new(dim.size // outer)
        for part in parts:
            part.whole, part.weight, part.feature, part.pinned = dim, dim.weight, dim.feature, dim.pinned
            part.repeated = dim.repeated
        dim.parts = (parts[0], parts[1])
        return True

    def regroup(self, axes: Axes, sizes: Sequence[int]) -> Axes | None:
        """The axes of a reshape to the given sizes, or None where they cut across dims."""
        leaves = [leaf for axis in axes for leaf in self.leaves(axis)]
        made = []
        for size in sizes:
            taken: list[Dim] = []
            room = size
            while room > 1:
                if not leaves:
                    return None
                leaf = self.find(leaves.pop(0))
                if leaf.parts is not None:
                    leaves[:0] = self.leaves((leaf,))
                    continue
                if leaf.size > room:
                    if leaf.size % room or not self.split(leaf, room):
                        return None
                    leaves[:0] = self.leaves((leaf,))
                    continue
                if not leaf.size or room % leaf.size:
                    return None
                taken.append(leaf)
                room //= leaf.size
            made.append(tuple(taken))
        return tuple(made)

    def part(self, axis: Axis, start: int, stop: int, step: int) -> Axis:
        """The axis of a slice: the same one wherever the same slice is taken."""
        leaves = self.leaves(axis)
        size = max(0, -(-(stop - start) // step))
        if size == 1:
            return ()
        for leaf in leaves:
            leaf.pinned = True
        key = (leaves, start, stop, step)
        if key not in self.slices:
            self.slices[key] = self.new(size)[0]
            self.slices[key].weight = any(leaf.weight for leaf in leaves)
            self.slices[key].feature = any(leaf.feature for leaf in leaves)
        return (self.slices[key],)

    def is_cut(self, axis: Axis) -> bool:
        """Whether pieces were taken out of an axis."""
        leaves = self.leaves(axis)
        return any(self.leaves(cut) == leaves for cut in self.beside)

    def is_piece(self, axis: Axis, whole: Axis) -> bool:
        """Whether an axis may be a piece of another: it is no feature, and has never stood beside it in one tensor."""
        leaves, all_leaves = self.leaves(axis), self.leaves(whole)
        if any(leaf.feature or leaf.gathered for leaf in leaves):
            return False
        others = (o for cut, beside in self.beside.items() if self.leaves(cut) == all_leaves for o in beside)
        return set(leaves).isdisjoint(leaf for other in others for leaf in self.leaves(other))

    def chunked(self, outer: Axis, inner: Axis) -> Axis:
        """The axis that was viewed as these two, rows of chunks and places within a chunk; () where none was."""
        both = (*self.leaves(outer), *self.leaves(inner))
        return both if both and self.leaves((self.root(both[0]),)) == both else ()

    def longer(self, axis: Axis, size: int) -> Axis:
        """The axis with positions added at its end: the same one wherever it is made as long as this."""
        key = (self.leaves(axis), size)
        if key not in self.pads:
            self.pads[key] = self.new(size)[0]
        return (self.pads[key],)
