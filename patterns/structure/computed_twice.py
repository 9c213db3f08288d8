"""Computed twice: one number that code computes from two views of one tensor (`exp(-g)` and `exp(-g[..., None])`).

A function of each number by itself does not mind how the numbers are laid out. The second computation becomes a view of
the first, so that a state and its normaliser are seen to have one decay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llcompile.patterns.structure.moves import TURNS, VIEWS
from llcompile.patterns.structure.program import Op, Program, Value

# The same numbers, or some of them, in another shape.
_LAYOUTS = VIEWS | TURNS | {"expand", "select", "slice"}
_DEEPEST = 8  # views of views
# Not pointwise by its tag, as it returns what its backward reads.
_POINTWISE = frozenset(["log_sigmoid_forward"])


def merge_computed_twice(program: Program) -> None:
    """Makes the second of two computations of the same numbers a view of the first, wherever it reads a view."""
    found: dict[Any, Value] = {}
    views: dict[Any, Value] = {}
    ops: list[Op] = []
    for op in program.ops:
        made = list(_as_view(op, found, views)) if _is_pointwise(op) else []
        ops.extend(made or [op])
        if not made and _is_pointwise(op):
            call = _call(op)
            found.setdefault((call, op.inputs[0]), op.outputs[0])
            views.setdefault((call, _whole(op.inputs[0])), op.outputs[0])
    for number, op in enumerate(ops):
        op.number = number
    program.ops[:] = ops


def _is_pointwise(op: Op) -> bool:
    """Whether it is a function of each number of one tensor by itself."""
    if len(op.inputs) != 1 or op.is_random or not op.outputs:
        return False
    if any(value.users for value in op.outputs[1:]) or op.args[:1] != (op.inputs[0],):
        return False
    pointwise = torch.Tag.pointwise in getattr(op.target, "tags", ())
    return op.name in _POINTWISE or (pointwise and op.name != "clone")


def _call(op: Op) -> Any:
    """What is called, but for the tensor."""
    return op.target, op.mode, repr((op.args[1:], op.kwargs))


def _whole(value: Value) -> Value:
    """What a value is a view of, with the numbers in the same order."""
    while value.op is not None and _keeps_order(value.op):
        value = value.op.inputs[0]
    return value


def _keeps_order(op: Op) -> bool:
    """Whether it lays the same numbers out in the same order; axes of size one may go anywhere."""
    if op.name not in TURNS:
        return op.name in VIEWS
    shape, order = op.inputs[0].shape, list(range(len(op.inputs[0].shape)))
    if op.name == "permute":
        order = [int(d) % len(order) for d in op.args[1]]
    elif len(order) > 1:
        i, j = (0, 1) if op.name == "t" else (int(d) % len(order) for d in op.args[1:3])
        order[i], order[j] = order[j], order[i]
    long = [d for d in order if shape[d] > 1]
    return long == sorted(long)


def _as_view(op: Op, found: dict[Any, Value], views: dict[Any, Value]) -> Iterator[Op]:
    """The operations that make an operation's result of an earlier one; none where there is no earlier one."""
    path: list[Op] = []
    call, current = _call(op), op.inputs[0]
    for _ in range(_DEEPEST):
        earlier = found.get((call, current))
        if earlier is not None:
            yield from _replayed(op, earlier, path[::-1])
            return
        if current.op is None or current.op.name not in _LAYOUTS:
            break
        path.append(current.op)
        current = current.op.inputs[0]
    earlier = views.get((call, _whole(op.inputs[0])))
    if earlier is not None:
        shape = list(op.outputs[0].shape)
        yield _replaced(op, torch.ops.aten.reshape.default, (earlier, shape), {}, op.outputs[0])


def _replayed(op: Op, value: Value, moves: list[Op]) -> Iterator[Op]:
    """The views that lie between a tensor and an operation's input, of another tensor."""
    for move in moves:
        last = move is moves[-1]
        made = op.outputs[0] if last else Value(move.outputs[0].shape, value.dtype)
        yield _replaced(op, move.target, (value, *move.args[1:]), move.kwargs, made)
        value = made


def _replaced(op: Op, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: Value) -> Op:
    """A new operation in the place of one, that makes a value."""
    if op in op.inputs[0].users:
        op.inputs[0].users.remove(op)
    new = Op(target, args, dict(kwargs), op.node, inputs=[args[0]], outputs=[made], mode=op.mode)
    args[0].users.append(new)
    made.op, made.index = new, 0
    return new
