"""Axis rules of what takes tensors to pieces and puts them together: slices, joins, indices."""

from __future__ import annotations

from llcompile.patterns.boundary import NotKnown
from llcompile.patterns.structure.axes import Axes, Axis
from llcompile.patterns.structure.axis_rules.call import Call, Rules, pin, size_of
from llcompile.patterns.structure.program import Value

_FILLED = frozenset(["zeros", "ones", "full", "new_zeros", "new_ones", "new_full"])


def _select(c: Call) -> list[Axes]:
    axes, d = c.axes[c.first], c.dim()
    c.cut(c.first, d)
    pin(c, axes[d])
    return [tuple(a for i, a in enumerate(axes) if i != d)]


def _slice(c: Call) -> list[Axes]:
    axes, d = c.axes[c.first], c.dim()
    size, start, stop, step = c.first.shape[d], c.arg("start") or 0, c.arg("end"), c.arg("step") or 1
    start = max(0, start + size) if start < 0 else min(start, size)
    stop = size if stop is None else max(0, stop + size) if stop < 0 else min(stop, size)
    if (start, stop, step) == (0, size, 1):
        return [axes]
    c.cut(c.first, d)
    whole = c.wholes(c.first, stop - start, axes[d]) if step == 1 else []
    part = c.dims.part(axes[d], start, stop, step)
    if whole and part:  # a sequence that was padded, or whose pieces were put together, cut to its length again
        c.dims.same(part, whole[0])
    return [(*axes[:d], part, *axes[d + 1 :])]


def _split(c: Call) -> list[Axes]:
    axes, d, start, made = c.axes[c.first], c.dim(), 0, []
    c.cut(c.first, d)
    for value in c.op.outputs:
        n = value.shape[d]
        made.append((*axes[:d], c.dims.part(axes[d], start, start + n, 1), *axes[d + 1 :]))
        start += n
    return made


def _unbind(c: Call) -> list[Axes]:
    return _select(c) * len(c.op.outputs)


def _cat(c: Call) -> list[Axes]:
    rank = len(c.op.outputs[0].shape)
    d = c.dim(rank=rank)
    tensors = [v for v in c.op.inputs if v.shape != (0,) and v.shape[d] > 0]
    if not tensors:
        raise NotKnown("nothing is put together")
    axes: list[Axis] = [()] * rank
    for value in tensors:
        axes = [
            c.pair(old, new) if i != d else () for i, (old, new) in enumerate(zip(axes, c.axes[value], strict=True))
        ]
    if len(tensors) == 1:
        return [c.axes[tensors[0]]]
    size, whole = c.op.outputs[0].shape[d], c.axes[tensors[0]][d]
    filled = all(_is_filled(value) for value in tensors[1:]) and 2 * tensors[0].shape[d] > size
    padded = filled and bool(whole)
    axes[d] = c.dims.longer(whole, size) if padded else c.assembled(size, {v: c.axes[v][d] for v in tensors})
    c.mix(*(() if padded else (axes[d],)), *(c.axes[v][d] for v in tensors))
    c.dims.joined.update(() if padded else (c.axes[v][d] for v in tensors))
    for value in tensors:
        pin(c, c.axes[value][d])
    pin(c, axes[d])
    return [tuple(axes)]


def _is_filled(value: Value) -> bool:
    """Whether it is a tensor of one number, for padding."""
    return value.op is not None and not value.op.inputs and value.op.name in _FILLED


def _stack(c: Call) -> list[Axes]:
    rank = len(c.op.outputs[0].shape)
    d = c.dim(rank=rank)
    axes: list[Axis] = [()] * (rank - 1)
    for value in c.op.inputs:
        axes = [c.pair(old, new) for old, new in zip(axes, c.axes[value], strict=True)]
    axis = c.assembled(c.op.outputs[0].shape[d], dict.fromkeys(c.op.inputs, ()))
    c.mix(axis)
    pin(c, axis)
    return [(*axes[:d], axis, *axes[d:])]


def _scatter(c: Call) -> list[Axes]:
    """A piece written into a whole: `select_scatter`, `slice_scatter`."""
    base, piece, d = c.of("self"), c.of("src"), c.dim()
    if len(piece) < len(base):
        piece = (*piece[:d], (), *piece[d:])
    axes = [c.pair(old, new) if i != d else old for i, (old, new) in enumerate(zip(base, piece, strict=True))]
    _write_along(c, axes[d], c.arg("src"), piece[d])
    c.mix(axes[d], piece[d])
    pin(c, axes[d])
    return [tuple(axes)]


def _write_along(c: Call, axis: Axis, piece: Value, along: Axis) -> None:
    """The axis that a piece is written along is the one that it was cut from, where their sizes agree.

    A piece that was cut from this very axis tells of no other. Where nothing of that size was cut, chunks may be
    written side by side. Features written side by side are no tokens, whatever size they have together: the states
    of all chunks may have as many rows as there are tokens.
    """
    whole = c.wholes(piece, size_of(c.dims, axis), along)
    if axis and whole and all(c.dims.leaves(a) != c.dims.leaves(axis) for a in whole):
        c.dims.same(axis, whole[0])
    elif not whole:
        feature = any(leaf.feature for leaf in c.dims.leaves(along))
        for leaf in c.dims.leaves(axis):
            leaf.assembled, leaf.gathered = True, leaf.gathered or feature


def _embedding(c: Call) -> list[Axes]:
    weight, indices = c.of("weight"), c.of("indices")
    return [(*indices, weight[-1])]


def _index(c: Call) -> list[Axes]:
    axes, indices = c.axes[c.first], c.arg("indices")
    given = [i for i, v in enumerate(indices) if v is not None]
    for i in given:
        c.mix(axes[i])
        pin(c, axes[i])
    if len(given) != 1:
        return [c.new()]
    at = given[0]
    return [(*axes[:at], *c.axes[indices[at]], *axes[at + 1 :])]


def _index_put(c: Call) -> list[Axes]:
    axes, indices = c.axes[c.first], c.arg("indices")
    if len(indices) == 1 and indices[0] is not None and indices[0].shape == c.first.shape:
        for axis, other in zip(axes, c.axes[indices[0]], strict=True):  # where a mask says so
            c.pair(axis, other)
        return [axes]
    for i, index in enumerate(indices):
        if index is not None:
            c.mix(axes[i])
            pin(c, axes[i])
    return [axes]


def _index_select(c: Call) -> list[Axes]:
    axes, d = c.axes[c.first], c.dim()
    c.mix(axes[d])
    pin(c, axes[d])
    return [(*axes[:d], c.dims.new(c.op.outputs[0].shape[d]), *axes[d + 1 :])]


def _index_add(c: Call) -> list[Axes]:
    """Pieces added up in a whole, each at a place that a number names."""
    base, pieces, d = c.of("self"), c.of("source"), c.dim()
    axes = [old if i == d else c.pair(old, new) for i, (old, new) in enumerate(zip(base, pieces, strict=True))]
    _write_along(c, axes[d], c.arg("source"), pieces[d])
    c.mix(axes[d], pieces[d])
    pin(c, axes[d])
    return [tuple(axes)]


# Rule, and the operations that follow it.
RULES: Rules = (
    (_select, "select"),
    (_slice, "slice"),
    (_split, "split split_with_sizes"),
    (_unbind, "unbind"),
    (_cat, "cat"),
    (_stack, "stack"),
    (_scatter, "select_scatter slice_scatter"),
    (_embedding, "embedding"),
    (_index, "index"),
    (_index_put, "index_put _unsafe_index_put"),
    (_index_select, "index_select"),
    (_index_add, "index_add"),
)
