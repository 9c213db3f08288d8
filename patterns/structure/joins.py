"""Joins: a value as the pieces that a loop put it together from, and the other way round."""

from __future__ import annotations

from typing import NamedTuple

import torch

from llcompile.patterns.structure.program import Op, Row, Value

_FEWEST = 4  # pieces of a loop
Pieces = tuple[Value, ...]


class Join(NamedTuple):
    """How pieces were put together: along `dim`, which they have (width > 0) or not (0)."""

    pieces: Pieces
    dim: int
    width: int
    ops: tuple[Op, ...]


def join_of(value: Value) -> Join | None:
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


def row_of(pieces: Pieces, like: Value, dim: int | None = None) -> Row:
    """Pieces as one value: laid end to end along a dimension, or on a new axis in front."""
    assert like.op is not None
    shape = list(pieces[0].shape)
    if dim is None:
        shape.insert(0, len(pieces))
    else:
        shape[dim] *= len(pieces)
    target = torch.ops.aten.stack.default if dim is None else torch.ops.aten.cat.default
    op = Op(target, (list(pieces), dim or 0), {}, like.op.node, like.op.number, list(pieces), mode=like.op.mode)
    row = Row(tuple(shape), pieces[0].dtype, op)
    op.outputs.append(row)
    return row
