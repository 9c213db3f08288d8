"""Axis rules of tensors that are made from nothing, and of operations that no rule knows."""

from __future__ import annotations

from llcompile.patterns.structure.axes import Axes, Axis
from llcompile.patterns.structure.axis_rules.call import Call, Rules, pin, size_of
from llcompile.patterns.structure.axis_rules.unknown import Pairs, measured


def _made(c: Call) -> list[Axes]:
    return [c.new(i) for i in range(len(c.op.outputs))]


def _filled(c: Call) -> list[Axes]:
    return [tuple(c.repeated(n) for n in v.shape) for v in c.op.outputs]


def _like(c: Call) -> list[Axes]:
    return [c.axes[c.first]]


def opaque(c: Call) -> list[Axes]:
    """An operation that the table does not know: its axes as they were measured, or by their sizes."""
    pairs = measured(c.op)
    return _by_size(c) if pairs is None else _by_measure(c, pairs)


def _by_measure(c: Call, pairs: Pairs) -> list[Axes]:
    made = [list(c.new(i)) for i in range(len(c.op.outputs))]
    for operand, value in enumerate(c.op.inputs):
        for axis, own in enumerate(c.axes[value]):
            pin(c, own)
            found = pairs.get((operand, axis))
            if found is None:
                c.mix(own)
            for result, d in enumerate(found or ()):
                if d >= 0:
                    made[result][d] = c.pair(own, made[result][d])
    for new in (axis for axes in made for axis in axes):
        pin(c, new)
    return [tuple(axes) for axes in made]


def _by_size(c: Call) -> list[Axes]:
    """Axes of sizes that only one axis has are that axis."""
    c.mix(*(axis for value in c.op.inputs for axis in c.axes[value]))
    known: dict[int, set[Axis]] = {}
    for value in c.op.inputs:
        for axis in c.axes[value]:
            pin(c, axis)
            known.setdefault(size_of(c.dims, axis), set()).add(c.dims.leaves(axis))
    made = []
    for value in c.op.outputs:
        axes = [next(iter(known[n])) if n > 1 and len(known.get(n, ())) == 1 else c.dims.new(n) for n in value.shape]
        twice = {a for a in axes if a and axes.count(a) > 1}
        axes = [c.dims.new(n) if a in twice else a for a, n in zip(axes, value.shape, strict=True)]
        for axis in axes:
            pin(c, axis)
        made.append(tuple(axes))
    return made


# Rule, and the operations that follow it.
RULES: Rules = (
    (_made, "empty arange eye scalar_tensor empty_strided rand randn linspace"),
    (_made, "new_empty new_empty_strided tril_indices triu_indices"),
    (_filled, "zeros ones full new_zeros new_ones new_full"),
    (_like, "zeros_like ones_like full_like empty_like rand_like randn_like"),
)
