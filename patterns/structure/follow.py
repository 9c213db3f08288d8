"""Follow: runs the axis rules over a program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from llcompile.patterns.boundary import NotKnown, boundary
from llcompile.patterns.structure.axes import Axes, Axis, Dims
from llcompile.patterns.structure.axis_rules.call import Call
from llcompile.patterns.structure.axis_rules.others import opaque
from llcompile.patterns.structure.axis_rules.table import rule_for
from llcompile.patterns.structure.program import Op, Program, Value

# Operations that may bring a weight in: what has the weight's axes are features.
WEIGHTED = frozenset(["mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "convolution", "embedding"])
_KEEP = 24  # cut axes that a value remembers
_TAKEN = "select slice split split_with_sizes unbind index index_select gather constant_pad_nd convolution"
_JOINED = "cat stack select_scatter slice_scatter index_put view _unsafe_view reshape repeat"
_CUTS = frozenset(f"{_TAKEN} {_JOINED}".split())


@dataclass
class Followed:
    """A program with its axes.

    Args:
        dims: all dims.
        axes: value -> its axes; `dims.leaves` resolves each to what it is by the end.
        mixed: operation -> the axes that it mixes.
        counts: how often each rule was used, by its name.
        live: values that the model's input has a part in.
        weights: the other values that a parameter has a part in.
    """

    dims: Dims
    axes: dict[Value, Axes]
    mixed: dict[Op, list[Axis]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    live: set[Value] = field(default_factory=set)
    weights: set[Value] = field(default_factory=set)


def follow(
    ops: Iterable[Op],
    inputs: Mapping[Value, Axes],
    dims: Dims,
    taken: Mapping[Value, tuple[Axis, ...]],
    live: Iterable[Value],
) -> Followed:
    """The axes of every value.

    Args:
        ops: the operations, in order.
        inputs: the axes of values that none of them computes; the others start with new ones.
        dims: what the inputs' axes are made of.
        taken: value -> the axes that it is one position of.
        live: those of the inputs that the model's input has a part in.
    """
    found = Followed(dims, dict(inputs), live=set(live))
    lost: dict[Value, tuple[Axis, ...]] = dict(taken)
    for op in ops:
        for value in op.inputs:
            if value not in found.axes:
                _start(found, value)
        _step(found, op, lost)
    return found


def follow_program(program: Program) -> Followed:
    """The axes of every value of a program."""
    dims = Dims()
    axes = _like_axes(program, dims)
    return follow(program.ops, axes, dims, {}, filter(_is_live, axes))


def _like_axes(program: Program, dims: Dims) -> dict[Value, Axes]:
    """Axes of the model's inputs: those of one size at one place are taken to be the same (queries, keys and values
    that come from outside). Only time is read off them; a subgraph has axes of its own."""
    shared: dict[tuple[int, int, int], Axis] = {}
    axes = {}
    for value in program.inputs:
        given = value.node is not None and value.node.op == "placeholder" and not value.parameter
        if given and value.data is None and value.dtype.is_floating_point:
            rank = len(value.shape)
            axes[value] = tuple(
                shared.setdefault((rank, position, size), dims.new(size)) for position, size in enumerate(value.shape)
            )
    return axes


def _start(found: Followed, value: Value) -> None:
    axes = tuple(found.dims.new(n) for n in value.shape)
    found.axes[value] = axes
    if _is_live(value):
        found.live.add(value)
    if value.parameter:
        found.weights.add(value)
    for axis in axes:
        for dim in axis:
            dim.weight = value.parameter
            dim.pinned = value.data is not None
    if _is_triangle(value):
        found.dims.same(axes[-1], axes[-2])


def _is_live(value: Value) -> bool:
    return value.data is None and not value.parameter


def _is_triangle(value: Value) -> bool:
    """Whether it is a mask that tells before from after."""
    data = value.data
    if data is None or data.dim() < 2 or data.shape[-1] != data.shape[-2] or data.shape[-1] == 1:
        return False
    return not bool(data.triu(1).any()) or not bool(data.tril(-1).any())


def _step(found: Followed, op: Op, lost: dict[Value, tuple[Axis, ...]]) -> None:
    rule = rule_for(op) or opaque
    call = Call(op, found.dims, found.axes, lost)
    with boundary(f"the axes of {op.name}", NotKnown) as outcome:
        results = rule(call)
    if outcome.failed:
        rule = opaque
        results = opaque(call)
    found.counts[rule.__name__.strip("_")] += 1
    found.mixed[op] = call.mixed
    # Features that were summed are gone for good; of a sequence that was cut, the pieces may come together again.
    cut = call.mixed if op.name in _CUTS or rule is opaque else []
    live = [value for value in op.inputs if value in found.live]
    weights = [value for value in op.inputs if value in found.weights]
    if op.name in WEIGHTED and live:
        _note_features(found, weights)
    # Where a table of numbers or a weight was cut alike (the decays of a loop's steps), the sequence is what was cut.
    gone = [axis for value in live or op.inputs for axis in lost.get(value, ())] + cut
    kept: dict[Axis, Axis] = {}
    for axis in reversed(gone):
        kept.setdefault(found.dims.leaves(axis), axis)
        if len(kept) == _KEEP:
            break
    for value, axes in zip(op.outputs, results, strict=True):
        if value in found.axes:  # a live-in of the subgraph, which is not computed here
            continue
        found.axes[value] = axes
        lost[value] = tuple(kept.values())
        if live:
            found.live.add(value)
        elif weights:
            found.weights.add(value)


def _note_features(found: Followed, weights: Iterable[Value]) -> None:
    for axis in (axis for value in weights for axis in found.axes[value]):
        for leaf in found.dims.leaves(axis):
            leaf.feature = True
