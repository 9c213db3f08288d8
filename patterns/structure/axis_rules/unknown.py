"""Unknown operations: which axis of a result is which axis of an operand, from what changes when numbers there change.

An operation that no rule knows is run on random numbers. Where a change at one position along an axis of an operand
changes one position along one axis of the result, and nothing else, the two are the same axis. Nothing is proved by it:
a mixer is proved as a whole, later.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llcompile.patterns.boundary import CannotRun, boundary, running
from llcompile.patterns.structure.nested import leaves, mapped
from llcompile.patterns.structure.program import Op, Value

_LARGEST = 1 << 22  # numbers in the tensors of an operation that is run
_known: dict[Any, Pairs | None] = {}

# (operand, its axis) -> the axis of each result that it is; -1 where a result does not have it.
Pairs = dict[tuple[int, int], tuple[int, ...]]


def measured(op: Op) -> Pairs | None:
    """The axes of the operation's results that are those of its operands; an axis that is missing is mixed.

    None where the operation is not one of torch's own, is random, is large or does not run.
    """
    key = _key(op)
    if key is None:
        return None
    if key not in _known:
        _known[key] = None
        with boundary(op.name, CannotRun):
            _known[key] = _measure(op)
    return _known[key]


def _key(op: Op) -> Any:
    target = op.target
    own = isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"
    if not own or op.is_random or target._schema.is_mutable:
        return None
    values = (*op.inputs, *op.outputs)
    if not op.inputs or not op.outputs or sum(math.prod(v.shape) for v in values) > _LARGEST:
        return None
    named = mapped(
        lambda a: (a.shape, a.dtype, op.inputs.index(a)) if isinstance(a, Value) else a, (op.args, op.kwargs)
    )
    return target, repr(named)


def _measure(op: Op) -> Pairs | None:
    generator = torch.Generator().manual_seed(0)
    numbers = {value: _drawn(value, generator) for value in op.inputs}
    base = _run(op, numbers)
    if [x.shape for x in base] != [v.shape for v in op.outputs]:
        return None
    found: Pairs = {}
    for operand, value in enumerate(op.inputs):
        other = _drawn(value, generator)
        for axis, size in enumerate(value.shape):
            if size < 2:
                continue
            changes = [_changed(op, numbers, base, value, other, axis, at) for at in {0, size // 2, size - 1}]
            pairs = [_paired(list(seen), size) for seen in zip(*changes, strict=True)]
            if all(pair is not None for pair in pairs):
                found[operand, axis] = tuple(pair for pair in pairs if pair is not None)
    return found


def _drawn(value: Value, generator: torch.Generator) -> Tensor:
    if not value.dtype.is_floating_point and not value.dtype.is_complex:
        return torch.randint(0, 2, value.shape, generator=generator).to(value.dtype)
    return torch.randn(value.shape, generator=generator, dtype=torch.promote_types(value.dtype, torch.float32))


def _run(op: Op, numbers: dict[Value, Tensor]) -> list[Tensor]:
    args, kwargs = mapped(lambda a: numbers[a] if isinstance(a, Value) else a, (op.args, op.kwargs))
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    with running(op.name):
        made = op.target(*args, **kwargs)
    return [leaf for leaf in leaves(made) if isinstance(leaf, Tensor)]


# Where a result changed: the position that was changed, the result's shape, and along each axis the positions.
Change = tuple[int, torch.Size, list[Tensor]]


def _changed(
    op: Op, numbers: dict[Value, Tensor], base: list[Tensor], value: Value, other: Tensor, axis: int, at: int
) -> list[Change]:
    x = numbers[value].clone()
    x.select(axis, at).copy_(other.select(axis, at))
    found = []
    for one, two in zip(base, _run(op, {**numbers, value: x}), strict=True):
        same = (one == two) | ((one != one) & (two != two))
        where = (~same).nonzero()
        found.append((at, one.shape, [where[:, d].unique() for d in range(one.dim())]))
    return found


def _paired(changes: list[Change], size: int) -> int | None:
    """The axis of a result that an operand's is; -1 where nothing in the result changed; None where it is mixed."""
    _, shape, _ = changes[0]
    if all(not any(len(positions) for positions in where) for _, _, where in changes):
        return -1
    for d, n in enumerate(shape):
        if n == size and all(where[d].tolist() == [at] for at, _, where in changes):
            return d
    return None
