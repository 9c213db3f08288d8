"""Tail: what a loop does with each piece of a mixer's output before the pieces are put together.

A token loop often projects, normalises or gates each output inside of the loop. The mixer then ends at no tensor of
the program, but at a row of them. Where all pieces are computed alike from the row, the row is put together first, and
what was done to each piece is done to all at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from llcompile.patterns.structure.facts import TimeAnalysis
from llcompile.patterns.structure.joins import Join, Pieces, join_of, row_of
from llcompile.patterns.structure.lift import bases_of
from llcompile.patterns.structure.lifted import Lifted, Lifter, Numbers, Taken, is_numbered
from llcompile.patterns.structure.moves import VIEWS
from llcompile.patterns.structure.program import Op, Row, Value
from llcompile.patterns.structure.rows import STATES

_LONGEST = 24  # operations that a tail may have
_TRIED = 6  # rows of one value that are tried as mixers
Kind = Callable[[Row], Literal["mixer", "sum"] | None]


@dataclass(eq=False)
class Tail:
    """A value as a function of a row of pieces.

    Args:
        output: the value.
        joined: the row, put together; no operation of the program computes it.
        root: what is done to each piece.
        dim, width: how the pieces are put together in the end.
        ops: the program's operations that it stands for.
        sides: further rows that it is computed from and that are sums of scores, mixers of their own.
    """

    output: Value
    joined: Value
    root: Lifted
    dim: int
    width: int
    ops: list[Op] = field(default_factory=list)
    sides: tuple[Value, ...] = ()

    @functools.cached_property
    def is_wide(self) -> bool:
        """Whether other rows than the mixer's output have a part in it."""
        return any(isinstance(base, Row) and base is not self.joined for base in bases_of(self.root))

    def assembled(self, pieces: Tensor) -> Tensor:
        """The output from the pieces [N, ...]."""
        made = pieces.movedim(0, self.dim)
        return made.flatten(self.dim, self.dim + 1) if self.width else made


def tails(value: Value, analysis: TimeAnalysis, lifter: Lifter, kind: Kind | None = None) -> Iterator[Tail]:
    """The rows of pieces that a value may be computed from alike, the last first. Each is valid until the next.

    Args:
        value: the value.
        analysis, lifter: of the program.
        kind: whether a row is a "mixer", or a "sum" of scores, as a divisor is; None for neither. Without it, only
            values that are computed from a single row have a tail.
    """
    join = join_of(value)
    if join is not None and _is_mixed(join.pieces, analysis):
        yield from _Unrolled(value, join, analysis, lifter, kind).tails()


# A row of these is a row of what they move.
_TRIVIAL = VIEWS | {"clone", "contiguous", "_to_copy"}


class _Unrolled:
    """A value followed back through a loop, from the pieces that it is put together from.

    Args:
        value, join: the value, and how it is put together.
        analysis, lifter: of the program.
        kind: see `tails`.
    """

    def __init__(self, value: Value, join: Join, analysis: TimeAnalysis, lifter: Lifter, kind: Kind | None) -> None:
        self.value, self.join, self.analysis, self.lifter, self.kind = value, join, analysis, lifter, kind
        self.root = Lifted(None, sample=join.pieces[0], count=len(join.pieces))
        self.open: dict[Pieces, Lifted] = {join.pieces: self.root}
        self.ends: dict[Pieces, Lifted] = {}
        self.ops, self.sides, self.tried = list(join.ops), list[Value](), 0
        self.main: Value | None = None

    def tails(self) -> Iterator[Tail]:
        """See `tails`."""
        for _ in range(_LONGEST):
            row = max(self.open, key=lambda r: r[0].op.number if r[0].op is not None else -1)
            several = len(self.open) > 1 or self.main is not None
            if not (several and self.kind is not None and self._ends_at(row)) and not self._expand(row):
                return
            if self.main is not None and not self.open:
                yield self._tail(self.main)
            if not self.open:
                return
            if len(self.open) == 1 and self.main is None:
                yield from self._cut()

    def _cut(self) -> Iterator[Tail]:
        (row, leaf) = next(iter(self.open.items()))
        joined = self._joined(row)
        if joined is None:
            return
        leaf.base = Taken(joined, *_place(joined, row))
        yield self._tail(joined)
        leaf.base = None

    def _tail(self, joined: Value) -> Tail:
        return Tail(self.value, joined, self.root, self.join.dim, self.join.width, list(self.ops), tuple(self.sides))

    def _joined(self, row: Pieces) -> Row | None:
        """The row as one value: chunks laid end to end, tokens on a new axis in front."""
        if row[0].op is None or row[0].op.name in _TRIVIAL or any(piece.shape != row[0].shape for piece in row):
            return None  # the first state of a loop may be smaller and broadcast
        axes = self.analysis.axes(row[0])
        inner = [i for i, found in enumerate(axes) if not self.analysis.chunks.isdisjoint(found)]
        if len(inner) > 1 or (inner and len(axes[inner[0]]) > 1):
            return None
        return row_of(row, self.value, inner[0] if inner else None)

    def _ends_at(self, row: Pieces) -> bool:
        """Whether one of several rows is to be followed no further: a mixer, its divisor, or what a loop carries."""
        joined = self._joined(row)
        if joined is None or self.kind is None:
            return False
        mixed = _is_mixed(row, self.analysis)
        kind = self.kind(joined) if self._may_be_mixer(row) and self.tried < _TRIED else None
        self.tried += self._may_be_mixer(row)
        if kind is None and (mixed or not self.lifter.rows.is_carried_on(row)):
            return False
        if kind == "mixer" and self.main is not None:
            return False
        if kind == "mixer":
            self.main = joined
        elif kind == "sum":
            self.sides.append(joined)
        leaf = self.open.pop(row)
        leaf.base, self.ends[row] = Taken(joined, *_place(joined, row)), leaf
        return True

    def _may_be_mixer(self, row: Pieces) -> bool:
        """Whether a mixer may end there: something is summed, or two values that join tokens meet."""
        op = row[-1].op
        assert op is not None
        if not _is_mixed(row, self.analysis):
            return op.name in STATES
        return bool(self.analysis.followed.mixed[op]) or sum(self.analysis.facts[v].mixed for v in op.inputs) > 1

    def _expand(self, row: Pieces) -> bool:
        """Takes one step back from a row: fills its operation in, and opens the rows that it is computed from."""
        calls = [v.op for v in row]
        first = calls[0]
        if first is None or first.is_random or not _are_alike(row):
            return False
        flat, spec = tree_flatten((first.args, first.kwargs))
        columns = list(zip(*(tree_leaves((op.args, op.kwargs)) for op in calls if op is not None), strict=False))
        if len(columns) != len(flat):
            return False
        filled: list[Any] = []
        opened: dict[Pieces, Lifted] = {}
        numbered = all(op is not None and is_numbered(op) for op in calls)
        for at, column in enumerate(columns):
            made = self._argument(column, self.open | self.ends | opened)
            if numbered and at == 1 and len(set(column)) > 1:
                made = Numbers(dict(enumerate(column)))
            if made is None and column[0] is not None:
                return False
            if isinstance(made, Lifted) and column not in self.open and made.op is None and made.base is None:
                opened[column] = made
            filled.append(made)
        leaf = self.open.pop(row)
        leaf.op, leaf.index = first, row[0].index
        leaf.args, leaf.kwargs = tree_unflatten(filled, spec)
        self.open.update(opened)
        self.ops.extend(op for op in calls if op is not None)
        return True

    def _argument(self, column: tuple[Any, ...], known: dict[Pieces, Lifted]) -> Any:
        """One argument of all the calls: the same thing, a piece of one sequence each, or another row; None for
        neither."""
        first, lifter = column[0], self.lifter
        if not isinstance(first, Value):
            return first if all(type(c) is type(first) and c == first for c in column) else None
        if not all(isinstance(c, Value) for c in column):
            return None
        name = lifter.name(first)
        if all(c is first or lifter.name(c) == name for c in column):
            return first if self.analysis.facts[first].form == "timeless" else None
        if _is_mixed(column, self.analysis):
            return known.get(column) or Lifted(None, sample=first, count=len(column))
        tables = {lifter.constant(c, len(column), i) for i, c in enumerate(column)}
        if len(tables) == 1 and None not in tables:
            return tables.pop()
        places = [lifter.place(c) for c in column]
        lifted = places[0][0] if places[0] is not None else None
        if lifted is None or lifted.count != len(column):
            return None
        inside = all(place is not None and place == (lifted, i) for i, place in enumerate(places))
        if inside and self.kind is not None and lifted.base is not None and isinstance(lifted.base.value, Row):
            return known.get(column) or Lifted(None, sample=first, count=len(column))
        return lifted if inside else None


def _are_alike(row: Pieces) -> bool:
    """Whether all pieces are the same result of the same operation."""
    return len({(None if v.op is None else v.op.target, v.index) for v in row}) == 1


def _is_mixed(row: Pieces, analysis: TimeAnalysis) -> bool:
    """Whether the pieces join several positions; the first one has nothing to join yet."""
    return all(analysis.facts[v].mixed for v in row[1:])


def _place(joined: Value, row: Pieces) -> tuple[int, int]:
    """The dimension and width of the pieces in the joined value."""
    if len(joined.shape) > len(row[0].shape):
        return 0, 0
    assert joined.op is not None
    dim = int(joined.op.args[1])
    return dim, row[0].shape[dim]
