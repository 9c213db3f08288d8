"""Facts: for one axis taken as time, what each value is in time, computed forward through the program."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from llcompile.patterns.structure.axes import Axis, Dim, length
from llcompile.patterns.structure.follow import WEIGHTED, Followed
from llcompile.patterns.structure.frame import Frame
from llcompile.patterns.structure.moves import CUTS, WRITES
from llcompile.patterns.structure.program import Op, Program, Value

# "sequence": it has all of time, once, as one axis or in chunks. "timeless": the same at all times.
# "pieces": anything else.
Form = Literal["timeless", "sequence", "pieces"]

_DIFFERENCES = frozenset(["sub", "add", "rsub"])
_JOINS = frozenset(["cat", "stack"])
_FEW = 3  # features, heads and streams are put together from as many pieces
_SCANS = frozenset(["cumsum", "cumprod", "logcumsumexp"])
_LARGEST = frozenset(["maximum", "fmax"])
_FACTORS = frozenset(["mul", "div"])
# What makes a number the same for all tokens, in training only, mixes no tokens.
_STATISTICS = frozenset(["native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"])


@dataclass
class Fact:
    """What one value is.

    Args:
        data: it depends on the model's input (and not only on parameters and numbers).
        weight: it depends on a parameter.
        form: see `Form`.
        mixed: it joins several positions, and no projection came after.
        met: two sequences have met in a state or in scores, and no projection came after.
        summed: a sum over the past, not seen as mixing, has a part in it.
        place: the position that pieces were taken from; None for no single one.
    """

    data: bool = False
    weight: bool = False
    form: Form = "timeless"
    mixed: bool = False
    met: bool = False
    place: tuple[int, ...] | None = None
    summed: bool = False


class TimeAnalysis(Frame):
    """The facts of a program for one choice of the time axis.

    Args:
        program: the graph.
        followed: its axes.
        time: the axis.
        shorter: that axis before it was padded.
        lone: what one sequence does with its own positions (a shift, a short convolution) is not seen as mixing.
        wide: nor are its sums over the past (keys less their mean so far), and numbers for each position that the input
            has no part in may be operands.
    """

    def __init__(
        self,
        program: Program,
        followed: Followed,
        time: Axis,
        shorter: Axis | None = None,
        lone: bool = False,
        wide: bool = False,
    ) -> None:
        super().__init__(followed, time)
        self.program, self.lone, self.wide = program, lone, wide
        self.shorter = self.leaves if shorter is None else followed.dims.leaves(shorter)
        self.chunks = self._chunks()
        self.facts: dict[Value, Fact] = {
            value: self._of_input(value) for value in program.inputs if value in followed.axes
        }

    def _chunks(self) -> set[Dim]:
        """The axes of chunks of equal width that the code cuts out of time."""
        dims, size = self.followed.dims, length(self.leaves)
        return {
            leaf
            for (leaves, start, stop, step), cut in dims.slices.items()
            if step == 1 and stop - start > 1 and size % (stop - start) == 0 == start % (stop - start)
            if dims.leaves(leaves) == self.leaves
            for leaf in dims.leaves((cut,))
        } - {*self.leaves}

    def _of_input(self, value: Value) -> Fact:
        given = value.node is not None and value.node.op == "placeholder" and value.data is None
        return Fact(data=given and not value.parameter, weight=value.parameter, form=self._form(value, True))

    def _form(self, value: Value, timeless: bool) -> Form:
        found = [leaf for axis in self.axes(value) for leaf in axis if self.is_time(leaf)]
        if not found:
            return "timeless" if timeless else "pieces"
        # Whole, though perhaps cut into chunks: [B, N, C, ...].
        return "sequence" if len(found) == len(self.leaves) and {*found} >= {*self.leaves} else "pieces"

    def mixes_time(self, op: Op) -> bool:
        """Whether the operation mixes positions of time."""
        axes = self.followed.mixed[op]
        return any(self._in_order(leaf) for axis in axes for leaf in self.axis_leaves(axis))

    def _in_order(self, leaf: Dim) -> bool:
        """Whether positions along it are positions in time: of all of it, or within a chunk."""
        return self.is_time(leaf) or leaf in self.chunks

    def step(self, op: Op) -> None:
        """Adds the facts of an operation's results; its operands' facts are there."""
        given = [self.facts.setdefault(v, Fact()) for v in op.inputs]
        mixes = self.mixes_time(op) and not self._fills(op) and op.name not in _STATISTICS
        timeless = not mixes and all(f.form == "timeless" for f in given)
        lone = self.lone and self._is_lone(op)
        data, weight, cuts = any(f.data for f in given), any(f.weight for f in given), op.name in CUTS
        summed = any(f.summed for f in given)
        # What contracts a sum of keys may be a divisor: no operand.
        lone = lone and not (summed and self.followed.mixed[op])
        contracts = summed and data and bool(self.followed.mixed[op])
        summed = summed or (lone and op.name in _SCANS)
        for value in op.outputs:
            form = self._form(value, timeless)
            place, joins = self._place(op, given, value.index)
            # A part of the sequence, made as long as it again: a shift.
            shift = form == "sequence" and not cuts and any(f.data and f.form == "pieces" for f in given)
            mixed = (
                (data and any(f.mixed for f in given))
                or contracts
                or (not lone and (shift or (data and (joins or (mixes and not cuts)))))
                or (form == "pieces" and self._crosses(op, value))
            ) and not (lone and form == "sequence" and self._falls(op))
            met = any(f.met for f in given) or self._meet(op) or self._is_outer(op, value)
            if (mixed or met) and self.is_projection(op):
                mixed, met = mixed and form != "sequence" and op.name != "convolution", False
            self.facts[value] = Fact(data, weight, form, mixed, met, place if form == "pieces" else None, summed=summed)

    def _is_lone(self, op: Op) -> bool:
        """Whether it does something with the positions of sequences that have not met: no states, sums or scores."""
        summed = op.name in _SCANS and not self.wide
        return not summed and not self._meet(op) and not any(self.facts[v].met for v in op.inputs)

    def is_row_factor(self, value: Value) -> bool:
        """Whether it has a number for each position, from the code and parameters alone, and is a factor or a divisor:
        the root of a row's sum of decays, how many tokens there are so far."""
        fact = self.facts[value]
        if not self.wide or fact.data or fact.form != "sequence" or value.node is None:
            return False
        return value.dtype.is_floating_point and any(u.name in _FACTORS and len(u.inputs) > 1 for u in value.users)

    def _meet(self, op: Op) -> bool:
        """Whether two sequences are contracted."""
        given = [f for f in map(self.facts.__getitem__, op.inputs) if f.data and f.form != "timeless"]
        return op.name in WEIGHTED and len(given) > 1

    def _falls(self, op: Op) -> bool:
        """Whether it picks the largest of decays: of what stands for each two positions, or of several for each."""
        if op.name in _LARGEST:
            return not any(self.facts[v].met for v in op.inputs)
        return self.mixes_time(op) and any(self._times_of(v) > len(self.leaves) for v in op.inputs)

    def _times_of(self, value: Value) -> int:
        return sum(self._in_order(leaf) for axis in self.axes(value) for leaf in axis)

    def _is_outer(self, op: Op, value: Value) -> bool:
        """Whether two sequences are multiplied to something larger; differences of one with itself are none."""
        if op.name in _DIFFERENCES and self._crosses(op, value):
            return False
        sizes = [math.prod(v.shape) for v in op.inputs if self.facts[v].data and self.facts[v].form != "timeless"]
        return len(sizes) > 1 and op.name not in _JOINS and math.prod(value.shape) > max(sizes)

    def _fills(self, op: Op) -> bool:
        """Whether it writes what no input has a part in (v[:, 0] = 0): every position remains its own."""
        return op.name in WRITES and not any(self.facts[v].data for v in op.inputs if v is not op.inputs[0])

    def _place(self, op: Op, given: list[Fact], index: int = 0) -> tuple[tuple[int, ...] | None, bool]:
        """The position that the result belongs to, and whether the operation joins several."""
        if op.name in CUTS and self.mixes_time(op):
            numbers = tuple(a for a in op.args[1:] if isinstance(a, int))
            return (*(given[0].place or ()), *numbers, index), False
        pieces = [f for f in given if f.data and f.form != "timeless"]
        places = {f.place for f in pieces}
        if any(f.form == "sequence" for f in pieces) and any(f.form == "pieces" and f.place for f in pieces):
            return None, True
        return (next(iter(places)), False) if len(places) == 1 else (None, len(places) > 1)

    def _crosses(self, op: Op, value: Value) -> bool:
        """Whether times of two operands stand across from each other in the result (scores)."""
        data = [v for v in op.inputs if self.facts[v].data and self.facts[v].form != "timeless"]
        if len(data) < 2:
            return False
        return self._times_of(value) > max(map(self._times_of, data))

    def is_projection(self, op: Op) -> bool:
        """Whether it contracts with what is the same at all times and does not come from the input: a weight."""
        given = [self.facts[v] for v in op.inputs if v in self.facts] if op.name in WEIGHTED else []
        return any(fact.form == "timeless" and not fact.data for fact in given)


def time_axes(program: Program, followed: Followed) -> list[Axis]:
    """The axes of the model's input that may be time, those first that most operations mix.

    An axis that a parameter has is a late choice (a table of positions), and what a weight is summed over the last: a
    feature, or the positions that a head takes together.
    """
    dims = followed.dims
    given = [v for v in program.inputs if v.data is None and not v.parameter and v in followed.axes]
    present = {dims.leaves(axis) for v in given for axis in followed.axes[v]}
    present |= _shortened(followed, present)
    mixed, ordered = _mixed(program, followed), _ordered(program, followed)
    free = [a for a in present if mixed(a) and _is_told_apart(a) and (not _is_feature(a) or a[0] in ordered)]
    return sorted(free, key=lambda a: (any(x.weight for x in a), _is_feature(a), -mixed(a), a[0].number))


def born_axes(program: Program, followed: Followed, known: Iterable[Axis]) -> tuple[list[Axis], list[Axis]]:
    """The other axes that may be time, which the model makes: tokens added in front, patches, every second token.

    All of such an axis is mixed: a batch that was laid out with it, as projections have it, is no part of it. Pieces of
    an axis that was cut in several, or that are put together with others, come second: chunks, most of the time.
    """
    dims, most = followed.dims, _mixed(program, followed)
    mixed = lambda axis: min(most((leaf,)) for leaf in axis)  # noqa: E731
    tried = [time for axis in known if not _is_feature(axis) for time in (axis, *lengthened(followed, axis))]
    leaves = {leaf for time in tried for leaf in dims.leaves(time)}
    used = (value for op in program.ops for value in op.inputs if value in followed.live)
    made = {dims.leaves(axis) for value in used for axis in followed.axes[value]}
    new = [axis for axis in made if not leaves.issuperset(axis) and mixed(axis)]
    born = [axis for axis in new if not _is_feature(axis) and _is_told_apart(axis)]
    pieces = _pieces(followed, made) | {axis for axis in born for other in born if set(axis) < set(other)}
    ranked = sorted(born, key=lambda axis: (-mixed(axis), axis[0].number))
    return [axis for axis in ranked if axis not in pieces], [axis for axis in ranked if axis in pieces]


def _pieces(followed: Followed, made: set[Axis]) -> set[Axis]:
    """Axes that are one of several pieces of another."""
    dims = followed.dims
    cut: dict[Axis, list[Axis]] = {}
    for (leaves, *_), piece in dims.slices.items():
        if dims.leaves((piece,)) in made:
            cut.setdefault(dims.leaves(leaves), []).append(dims.leaves((piece,)))
    several = {piece for pieces in cut.values() if len(pieces) > 1 for piece in pieces}
    return several | {dims.leaves(axis) for axis in dims.joined}


def _mixed(program: Program, followed: Followed) -> Callable[[Axis], int]:
    """How many operations on the model's input mix an axis."""
    counts: Counter[Dim] = Counter()
    for op in program.ops:
        if not followed.live.isdisjoint(op.inputs):
            counts.update({leaf for axis in followed.mixed[op] for leaf in followed.dims.leaves(axis)})
    return lambda axis: max((counts[leaf] for leaf in axis), default=0)


def _ordered(program: Program, followed: Followed) -> set[Dim]:
    """Axes of the input's data that something runs along in order, or that stand across from themselves (scores)."""
    found: set[Dim] = set()
    for op in program.ops:
        if followed.live.isdisjoint(op.inputs):
            continue
        if op.name in _JOINS and len(op.inputs) > _FEW:  # the outputs of a loop over tokens
            dim = int(op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0))
            found.update(followed.dims.leaves(followed.axes[op.outputs[0]][dim]))
        if op.name in _SCANS:
            found.update(leaf for axis in followed.mixed[op] for leaf in followed.dims.leaves(axis))
        for value in op.outputs:
            leaves = [leaf for axis in followed.axes[value] for leaf in followed.dims.leaves(axis)]
            found.update(leaf for leaf, analysis in Counter(leaves).items() if analysis > 1)
    return found


def _is_feature(axis: Axis) -> bool:
    return any(leaf.feature for leaf in axis)


def _is_told_apart(axis: Axis) -> bool:
    """Whether no two parts of it were taken for one (the levels of a tree in place, each over halves of the last)."""
    return len(set(axis)) == len(axis)


def lengthened(followed: Followed, time: Axis) -> list[Axis]:
    """Time with positions added at its end, as code does that works in whole chunks."""
    dims, most = followed.dims, 2 * length(time)
    pads = [axis for (leaves, size), axis in dims.pads.items() if dims.leaves(leaves) == time and size < most]
    return list(dict.fromkeys(dims.leaves((axis,)) for axis in pads))


def _shortened(followed: Followed, present: set[Axis]) -> set[Axis]:
    """Axes that are most of an axis of the input (all tokens but the last)."""
    return {
        followed.dims.leaves((cut,))
        for (leaves, start, stop, step), cut in followed.dims.slices.items()
        if followed.dims.leaves(leaves) in present and step == 1 and 4 * (stop - start) > 3 * length(leaves)
    }
