"""Tail: what a loop does with each piece of a mixer's output before the pieces are put together.

A token loop often projects, normalises or gates each output inside of the loop. The mixer then ends at no tensor of
the program, but at a row of them. Where all pieces are computed alike from the row, the row is put together first, and
what was done to each piece is done to all at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from llcompile.patterns.structure.facts import TimeAnalysis
from llcompile.patterns.structure.lifted import Lifted, Lifter, Numbers, Taken, is_numbered
from llcompile.patterns.structure.moves import VIEWS
from llcompile.patterns.structure.program import Op, Value

_FEWEST = 4  # pieces of a loop
_LONGEST = 24  # operations that a tail may have
Pieces = tuple[Value, ...]


class Join(NamedTuple):
    """How pieces were put together: along `dim`, which they have (width > 0) or not (0)."""

    pieces: Pieces
    dim: int
    width: int
    ops: tuple[Op, ...]


@dataclass(eq=False)
class Tail:
    """A value as a function of a row of pieces.

    Args:
        output: the value.
        joined: the row, put together; no operation of the program computes it.
        root: what is done to each piece.
        dim, width: how the pieces are put together in the end.
        ops: the program's operations that it stands for.
    """

    output: Value
    joined: Value
    root: Lifted
    dim: int
    width: int
    ops: list[Op] = field(default_factory=list)

    def assembled(self, pieces: Tensor) -> Tensor:
        """The output from the pieces [N, ...]."""
        made = pieces.movedim(0, self.dim)
        return made.flatten(self.dim, self.dim + 1) if self.width else made


def tails(value: Value, analysis: TimeAnalysis, lifter: Lifter) -> Iterator[Tail]:
    """The rows of pieces that a value may be computed from alike, the last first. Each is valid until the next."""
    join = _join(value)
    if join is None or not _is_mixed(join.pieces, analysis):
        return
    root = Lifted(None, sample=join.pieces[0], count=len(join.pieces))
    open_rows, ops = {join.pieces: root}, list(join.ops)
    for _ in range(_LONGEST):
        row = max(open_rows, key=lambda r: r[0].op.number if r[0].op is not None else -1)
        if not _expand(row, open_rows, analysis, lifter, ops):
            return
        if len(open_rows) == 1:
            yield from _cut_at(value, join, root, open_rows, ops, analysis)


def _cut_at(
    value: Value, join: Join, root: Lifted, open_rows: dict[Pieces, Lifted], ops: list[Op], analysis: TimeAnalysis
) -> Iterator[Tail]:
    (row, leaf) = next(iter(open_rows.items()))
    if row[0].op is None or row[0].op.name in _TRIVIAL:
        return
    joined = _joined(value, row, analysis)
    if joined is None:
        return
    leaf.base = Taken(joined, *_place(joined, row))
    yield Tail(value, joined, root, join.dim, join.width, list(ops))
    leaf.base = None


# A row of these is a row of what they move.
_TRIVIAL = VIEWS | {"clone", "contiguous", "_to_copy"}


def _expand(
    row: Pieces, open_rows: dict[Pieces, Lifted], analysis: TimeAnalysis, lifter: Lifter, ops: list[Op]
) -> bool:
    """Takes one step back from a row: fills its operation in, and opens the rows that it is computed from."""
    calls = [v.op for v in row]
    first = calls[0]
    if first is None or any(
        op is None or op.target is not first.target or v.index != row[0].index for v, op in zip(row, calls, strict=True)
    ):
        return False
    if first.is_random:
        return False
    flat, spec = tree_flatten((first.args, first.kwargs))
    columns = list(zip(*(tree_leaves((op.args, op.kwargs)) for op in calls if op is not None), strict=False))
    if len(columns) != len(flat):
        return False
    filled: list[Any] = []
    opened: dict[Pieces, Lifted] = {}
    numbered = all(op is not None and is_numbered(op) for op in calls)
    for at, column in enumerate(columns):
        made = _argument(column, open_rows | opened, analysis, lifter)
        if numbered and at == 1 and len(set(column)) > 1:
            made = Numbers(dict(enumerate(column)))
        if made is None and column[0] is not None:
            return False
        if isinstance(made, Lifted) and column not in open_rows and made.op is None and made.base is None:
            opened[column] = made
        filled.append(made)
    leaf = open_rows.pop(row)
    leaf.op, leaf.index = first, row[0].index
    leaf.args, leaf.kwargs = tree_unflatten(filled, spec)
    open_rows.update(opened)
    ops.extend(op for op in calls if op is not None)
    return True


def _argument(column: tuple[Any, ...], known: dict[Pieces, Lifted], analysis: TimeAnalysis, lifter: Lifter) -> Any:
    """One argument of all the calls: the same thing, a piece of one sequence each, or another row; None for neither."""
    first = column[0]
    if not isinstance(first, Value):
        return first if all(type(c) is type(first) and c == first for c in column) else None
    if not all(isinstance(c, Value) for c in column):
        return None
    name = lifter.name(first)
    if all(c is first or lifter.name(c) == name for c in column):
        return first if analysis.facts[first].form == "timeless" else None
    if _is_mixed(column, analysis):
        return known.get(column) or Lifted(None, sample=first, count=len(column))
    tables = {lifter.constant(c, len(column), i) for i, c in enumerate(column)}
    if len(tables) == 1 and None not in tables:
        return tables.pop()
    places = [lifter.place(c) for c in column]
    lifted = places[0][0] if places[0] is not None else None
    if lifted is None or lifted.count != len(column):
        return None
    inside = all(place is not None and place == (lifted, i) for i, place in enumerate(places))
    return lifted if inside else None


def _is_mixed(row: Pieces, analysis: TimeAnalysis) -> bool:
    """Whether the pieces join several positions; the first one has nothing to join yet."""
    return all(analysis.facts[v].mixed for v in row[1:])


def _join(value: Value) -> Join | None:
    """A value as the pieces that it is put together from."""
    op = value.op
    if op is None:
        return None
    made = _written(value) if op.name in ("select_scatter", "slice_scatter") else _listed(op)
    if made is None or len(made.pieces) < _FEWEST or len({p.shape for p in made.pieces}) > 1:
        return None
    return made


def _listed(op: Op) -> Join | None:
    if op.name not in ("stack", "cat"):
        return None
    rank = len(op.outputs[0].shape)
    dim = int(op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)) % rank
    if op.name == "stack":
        return Join(tuple(op.args[0]), dim, 0, (op,))
    pieces, ops = _flattened(op)
    pieces = [piece for piece in pieces if piece.shape != (0,) and piece.shape[dim] > 0]
    return Join(tuple(pieces), dim, pieces[0].shape[dim], tuple(ops)) if pieces else None


def _flattened(op: Op) -> tuple[list[Value], list[Op]]:
    """The pieces of a tensor that grew by one piece at a time."""
    pieces: list[Value] = []
    pending, ops = [op], [op]
    while pending:
        head, *rest = pending.pop().args[0]
        pieces[:0] = rest
        inner = head.op
        if inner is not None and inner.name == "cat" and inner.args[1:] == op.args[1:]:
            pending.append(inner)
            ops.append(inner)
        else:
            pieces.insert(0, head)
    return pieces, ops


def _written(value: Value) -> Join | None:
    """Pieces written one after another into a tensor, all of it."""
    found: dict[int, Value] = {}
    last = value.op
    assert last is not None
    keeps, dim, ops = last.name == "slice_scatter", int(last.args[2]), [last]
    current: Value = value
    while current.op is not None and current.op.name == last.name and int(current.op.args[2]) == dim:
        op = current.op
        if len(op.args) < 4 or (keeps and len(op.args) > 5):
            return None
        found.setdefault(int(op.args[3] or 0), op.args[1])
        ops.append(op)
        current = op.args[0]
    pieces = tuple(found[at] for at in sorted(found))
    dim %= len(value.shape)
    width = pieces[0].shape[dim] if keeps else 0
    if sorted(found) != [i * max(1, width) for i in range(value.shape[dim] // max(1, width))]:
        return None
    return Join(pieces, dim, width, tuple(ops))


def _joined(value: Value, row: Pieces, analysis: TimeAnalysis) -> Value | None:
    """The row as one value: chunks laid end to end, tokens on a new axis in front."""
    assert value.op is not None
    first = row[0]
    if any(piece.shape != first.shape for piece in row):
        return None  # the first state of a loop may be smaller and broadcast
    axes = analysis.axes(first)
    inner = [i for i, found in enumerate(axes) if not analysis.chunks.isdisjoint(found)]
    if len(inner) > 1 or (inner and len(axes[inner[0]]) > 1):
        return None
    target, dim = (torch.ops.aten.cat.default, inner[0]) if inner else (torch.ops.aten.stack.default, 0)
    shape = list(first.shape)
    if inner:
        shape[dim] *= len(row)
    else:
        shape.insert(0, len(row))
    op = Op(target, (list(row), dim), {}, value.op.node, value.op.number, list(row), mode=value.op.mode)
    made = Value(tuple(shape), first.dtype, op)
    op.outputs.append(made)
    return made


def _place(joined: Value, row: Pieces) -> tuple[int, int]:
    """The dimension and width of the pieces in the joined value."""
    if len(joined.shape) > len(row[0].shape):
        return 0, 0
    assert joined.op is not None
    dim = int(joined.op.args[1])
    return dim, row[0].shape[dim]
