"""Axis rules of what lays the same numbers out in another shape, or acts on each number by itself."""

from __future__ import annotations

from llcompile.patterns.structure.axes import Axes, Axis
from llcompile.patterns.structure.axis_rules.call import Call, Rules, pin, size_of


def pointwise(c: Call) -> list[Axes]:
    """Operands broadcast against each other; what has the same place is the same axis."""
    rank = len(c.op.outputs[0].shape)
    axes: list[Axis] = [()] * rank
    for value in c.op.inputs:
        for i, axis in enumerate(c.axes[value]):
            at = rank - len(value.shape) + i
            axes[at] = c.pair(axes[at], axis)
    full = tuple(a if a or n == 1 else c.dims.new(n) for a, n in zip(axes, c.op.outputs[0].shape, strict=True))
    return [full] * len(c.op.outputs)


def _same(c: Call) -> list[Axes]:
    return [c.axes[c.first]] * len(c.op.outputs)


def _copy(c: Call) -> list[Axes]:
    """The destination's numbers do not matter, its shape does."""
    return pointwise(c)


def _view(c: Call) -> list[Axes]:
    made = c.dims.regroup(c.axes[c.first], c.op.outputs[0].shape)
    return [tuple(_interleaved(c, axis) for axis in made) if made is not None else _cut_across(c)]


def _interleaved(c: Call, axis: Axis) -> Axis:
    """Rows of pieces laid side by side (evens and odds in the tree of a parallel scan) are the axis they came from."""
    leaves = c.dims.leaves(axis)
    if len(leaves) < 2 or not any(leaf.assembled for leaf in leaves):
        return axis
    size, learned = size_of(c.dims, axis), any(leaf.weight for leaf in leaves)
    cut = [found for found in map(c.dims.leaves, c.lost.get(c.first, ())) if size_of(c.dims, found) == size]
    # Rows of tokens are no channels that were cut, though there may be as many.
    if not any(found != leaves and any(leaf.weight for leaf in found) == learned for found in cut):
        return axis
    c.mix(axis)
    return c.assembled(size, {c.first: axis})


def _cut_across(c: Call) -> Axes:
    c.mix(*c.axes[c.first])
    return c.new()


def _permute(c: Call) -> list[Axes]:
    axes = c.axes[c.first]
    return [tuple(axes[d] for d in c.arg("dims"))]


def _transpose(c: Call) -> list[Axes]:
    axes = list(c.axes[c.first])
    i, j = c.dim("dim0"), c.dim("dim1")
    axes[i], axes[j] = axes[j], axes[i]
    return [tuple(axes)]


def _t(c: Call) -> list[Axes]:
    return [c.axes[c.first][::-1]]


def _unsqueeze(c: Call) -> list[Axes]:
    axes = c.axes[c.first]
    d = c.dim(rank=len(axes) + 1)
    return [(*axes[:d], (), *axes[d:])]


def _squeeze(c: Call) -> list[Axes]:
    axes, given = c.axes[c.first], c.arg("dim")
    rank = len(axes)
    removed = range(rank) if given is None else [given] if isinstance(given, int) else given
    drop = {d % rank for d in removed if rank} & {i for i, n in enumerate(c.first.shape) if n == 1}
    return [tuple(a for i, a in enumerate(axes) if i not in drop)]


def _expand(c: Call) -> list[Axes]:
    axes, shape = c.axes[c.first], c.op.outputs[0].shape
    old = len(shape) - len(axes)
    made = []
    for i, n in enumerate(shape):
        axis = axes[i - old] if i >= old else ()
        made.append(axis or c.repeated(n))
    return [tuple(made)]


def _repeat(c: Call) -> list[Axes]:
    axes, counts = c.axes[c.first], c.arg("repeats")
    axes = ((),) * (len(counts) - len(axes)) + axes
    return [tuple(c.dims.new(n) + a for n, a in zip(counts, axes, strict=True))]


def _pad(c: Call) -> list[Axes]:
    axes, pads, shape = list(c.axes[c.first]), c.arg("pad"), c.op.outputs[0].shape
    for i in range(len(pads) // 2):
        before, after, d = pads[2 * i], pads[2 * i + 1], len(axes) - 1 - i
        if before or after:
            c.mix(axes[d])
            pin(c, axes[d])
            if before == 0 and after > 0 and axes[d]:
                axes[d] = c.dims.longer(axes[d], shape[d])
            elif before + after:  # else a shift: padded at one end and cut at the other
                axes[d] = c.assembled(shape[d], {c.first: axes[d]})
    return [tuple(axes)]


def _as_complex(c: Call) -> list[Axes]:
    """The last axis holds the real and the imaginary part."""
    axes = c.axes[c.first]
    c.mix(axes[-1])
    return [axes[:-1]]


def _as_real(c: Call) -> list[Axes]:
    return [(*c.axes[c.first], c.dims.new(2))]


# Rule, and the operations that follow it.
RULES: Rules = (
    (_same, "clone contiguous _to_copy lift_fresh_copy detach alias native_dropout bernoulli log_sigmoid_forward"),
    (_copy, "copy"),
    (_view, "view _unsafe_view reshape _reshape_alias"),
    (_permute, "permute"),
    (_transpose, "transpose"),
    (_t, "t"),
    (_unsqueeze, "unsqueeze"),
    (_squeeze, "squeeze"),
    (_expand, "expand"),
    (_repeat, "repeat"),
    (_pad, "constant_pad_nd"),
    (_as_complex, "view_as_complex"),
    (_as_real, "view_as_real"),
)
