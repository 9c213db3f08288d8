"""Cut: the subgraph that makes one value out of values that are pointwise in time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llcompile.patterns.graph.walk import walk
from llcompile.patterns.structure.axes import Axes, Axis, Dim, Dims, length
from llcompile.patterns.structure.facts import TimeAnalysis
from llcompile.patterns.structure.follow import Followed, follow
from llcompile.patterns.structure.frame import Frame
from llcompile.patterns.structure.lifted import Lifted, Lifter, LiveIn, made_of, sample_of
from llcompile.patterns.structure.moves import MOVES, SHAPES
from llcompile.patterns.structure.program import Op, Value


@dataclass
class Subgraph:
    """The operations between a cut and a value.

    Args:
        result: the value.
        live_ins: the cut: what comes in.
        ops: the operations, in order.
        taps: lifted live-in -> the values of single pieces that it stands for, with their positions.
        earlier: live-ins that join positions already: outputs of mixers that come before.
        learned: live-ins that the model's input has no part in.
        columns: tensors that are taken feature by feature, with that dimension.
        functions: sizes and dtype -> the subgraph as a function, once it was written out.
    """

    result: Value
    live_ins: list[LiveIn]
    ops: list[Op]
    taps: dict[Lifted, dict[Value, int]] = field(default_factory=dict)
    earlier: frozenset[Value] = frozenset()
    learned: frozenset[LiveIn] = frozenset()
    columns: list[tuple[Value, int]] = field(default_factory=list)
    functions: dict[Any, Callable[..., Tensor]] = field(default_factory=dict)

    @functools.cached_property
    def random(self) -> Op | None:
        """The first operation that draws numbers; nothing can be measured of a mixer with one."""
        return next((op for op in self.ops if op.is_random), None)

    @functools.cached_property
    def is_detached(self) -> bool:
        """Whether no gradient reaches any live-in: a `detach` stands on every way to each of them."""
        ends = {v for s in self.live_ins for v in (self.taps[s] if isinstance(s, Lifted) else (s,))}
        above = lambda v: () if v in ends or v.op is None or v.op.name == "detach" else v.op.inputs  # noqa: E731
        return ends.isdisjoint(walk([self.result], above))


class Cutter:
    """Cuts subgraphs out of a program, as close to where times are mixed as it is allowed to.

    Args:
        analysis: the facts.
        zeros: values that are zero whatever comes in (an empty state times a decay): never cut at.
    """

    def __init__(self, analysis: TimeAnalysis, zeros: Container[Value] = ()) -> None:
        self.analysis, self.zeros = analysis, zeros
        self.views = self.rows = False
        self.lifter = Lifter(analysis)

    @property
    def length(self) -> int:
        """The number of positions."""
        return length(self.analysis.leaves)

    def cut(
        self,
        result: Value,
        passed: Iterable[LiveIn] = (),
        views: bool = False,
        limit: int = 200_000,
        rows: bool = False,
    ) -> Subgraph | None:
        """The subgraph that makes `result`; None for more operations than `limit`.

        Values in `passed` are not cut at, but what they are made of. With `views`, two views of one tensor are two
        live_ins: queries that are the keys as well. With `rows`, the rows of a table that are read token by token are
        one live-in with time.
        """
        self.views, self.rows = views, rows
        earlier: frozenset[Value] = frozenset()
        while True:
            subgraph = self._cut(result, set(passed), earlier, limit)
            further = frozenset() if subgraph is None else self._earlier(subgraph)
            if not further:
                return subgraph
            earlier |= further

    def _cut(self, result: Value, through: set[LiveIn], earlier: frozenset[Value], limit: int) -> Subgraph | None:
        live_ins: dict[LiveIn, None] = {}
        ops: dict[Op, None] = {}
        taps: dict[Lifted, dict[Value, int]] = {}
        pending, seen = [result], {result}
        while pending:
            value = pending.pop()
            live_in = value if value in earlier else None if value is result else self._source(value, through, taps)
            if live_in is not None:
                live_ins.setdefault(live_in)
                continue
            if value.op is None:
                if value.data is None:
                    live_ins.setdefault(value)
                continue
            if value.op in ops:
                continue
            ops.setdefault(value.op)
            if len(ops) > limit:
                return None
            for parent in value.op.inputs:
                if parent not in seen:
                    seen.add(parent)
                    pending.append(parent)
        learned = frozenset(s for s in live_ins if isinstance(s, Value) and not self.analysis.facts[s].data)
        ordered = sorted(ops, key=lambda op: op.number)
        return Subgraph(result, list(live_ins), ordered, taps, earlier & set(live_ins), learned)

    def _earlier(self, subgraph: Subgraph) -> frozenset[Value]:
        """Values inside that are whole sequences, join positions, and are what the live-ins are computed from.

        A mixer's output on a residual stream: the next layer is added to it, and has it as its input.
        """
        facts = self.analysis.facts
        inside = (v for op in subgraph.ops for v in op.outputs if v is not subgraph.result)
        mixed = {v for v in inside if facts[v].mixed and facts[v].form == "sequence"}
        if self.analysis.lone:  # decays that were summed up, beside the largest of them
            mixed = {v for v in mixed if facts[v].met}
        if not mixed:
            return frozenset()
        first = min(value.op.number for value in mixed if value.op is not None)
        read = (v for s in subgraph.live_ins for v in (subgraph.taps[s] if isinstance(s, Lifted) else (s,)))

        def above(value: Value) -> Iterable[Value]:
            return () if value in mixed or value.op is None or value.op.number <= first else value.op.inputs

        reached = walk((v for v in read if v not in subgraph.earlier), above)
        return frozenset(value for value in reached if value in mixed)

    def frame(self, subgraph: Subgraph) -> tuple[Frame, dict[LiveIn, Axes]]:
        """The subgraph's own axes, and those of its live-ins.

        New ones: in the whole program two axes can be the same only because they were cut from one tensor (the keys and
        values of a fused projection).
        """
        dims, analysis = Dims(), self.analysis
        time = dims.new(self.length)
        for sizes in self._chunkings(subgraph):
            dims.regroup((time,), sizes)
        axes: dict[Value, Axes] = {}
        taken: dict[Value, tuple[Axis, ...]] = {}
        live_ins: dict[LiveIn, Axes] = {}
        for live_in in subgraph.live_ins:
            piece = self._renewed(dims, time, analysis.followed.axes[sample_of(live_in)])
            if isinstance(live_in, Value):
                axes[live_in] = live_ins[live_in] = piece
                continue
            outer, _ = _divided(dims, time, live_in.count)
            live_ins[live_in] = (outer, *piece)
            for value in (sample_of(live_in), *subgraph.taps[live_in]):
                axes[value], taken[value] = piece, (outer, time)
        live = [value for value in axes if analysis.facts[value].data]
        followed = follow(subgraph.ops, axes, dims, taken, live)
        _meet(subgraph, followed)
        frame = Frame(followed, time)
        return frame, {live_in: frame.unsplit(found) for live_in, found in live_ins.items()}

    def _chunkings(self, subgraph: Subgraph) -> list[tuple[int, ...]]:
        """The ways in which the live-ins have time in chunks."""
        analysis, found = self.analysis, []
        for live_in in subgraph.live_ins:
            held = [sum(map(analysis.is_time, axis)) for axis in analysis.axes(sample_of(live_in))]
            if any(0 < times < len(analysis.leaves) for times in held):
                found.append(tuple(leaf.size for leaf in analysis.leaves))
            if isinstance(live_in, Lifted) and live_in.count < self.length:
                found.append((live_in.count, self.length // live_in.count))
        return list(dict.fromkeys(found))

    def _renewed(self, dims: Dims, time: Axis, axes: Axes) -> Axes:
        """New axes for a live-in. Time is shared; where the live-in has it in chunks, it is split."""
        analysis, inner = self.analysis, dims.leaves(time)
        places = {leaf: i for i, leaf in enumerate(analysis.leaves)}
        made = []
        for axis in analysis.unsplit(axes):
            renewed: list[Dim] = []
            for leaf in axis:
                if leaf in places:
                    whole = inner if not places[leaf] else ()
                    renewed.extend([inner[places[leaf]]] if len(inner) == len(places) else whole)
                elif leaf in analysis.chunks:
                    renewed.extend(_divided(dims, time, self.length // leaf.size)[1])
                else:
                    new = dims.new(leaf.size)[0]
                    new.weight, new.feature = leaf.weight, leaf.feature
                    renewed.append(new)
            made.append(tuple(renewed))
        return tuple(made)

    def parents(self, live_in: LiveIn) -> list[LiveIn]:
        """What a live-in is computed from, if it can be cut there."""
        return [a.base[0] if isinstance(a, Lifted) and a.base else a for a in made_of(live_in)]

    def _source(self, value: Value, through: set[LiveIn], taps: dict[Lifted, dict[Value, int]]) -> LiveIn | None:
        fact = self.analysis.facts[value]
        if self.analysis.is_row_factor(value):
            return None if value in through else value
        if value.data is not None or fact.mixed or (value in self.zeros and not self._is_numbered(value)):
            return None
        if fact.form == "pieces":
            lifted = self.lifter.place(value) if fact.data else None
            if lifted is None or (lifted[0].is_plain and not self._is_view(lifted[0])) or lifted[0] in through:
                return None
            if not self.views and lifted[0].op is not None and lifted[0].op.name in MOVES:
                return None
            taps.setdefault(lifted[0], {})[value] = lifted[1]
            return lifted[0]
        row = self._row(value) if self.rows else None
        if row is not None and row[0] not in through:
            taps.setdefault(row[0], {})[value] = row[1]
            return row[0]
        if value.node is None or value in through or (not self.views and self._only_moves(value)):
            return None
        if fact.data:
            return value
        return value if fact.weight and fact.form == "timeless" and not self._is_repeated(value) else None

    def _is_view(self, lifted: Lifted) -> bool:
        """Whether pieces are views of what was taken, and views are told apart: keys that are the values as well."""
        return self.views and lifted.op is not None and lifted.op.name in MOVES

    def _row(self, value: Value) -> tuple[Lifted, int] | None:
        """A row of a table that belongs to one piece, and its position: a decay that was learned for each step."""
        if self.analysis.facts[value].data or (value.op is not None and value.op.name in MOVES):
            return None
        return self.lifter.table_row(value, self.length)

    def _is_numbered(self, value: Value) -> bool:
        """Whether it is zero for the number of its piece alone: `k * t` of the first token."""
        fact = self.analysis.facts[value]
        lifted = self.lifter.place(value) if fact.form == "pieces" and fact.data else None
        return lifted is not None and lifted[0].has_numbers

    def _is_repeated(self, value: Value) -> bool:
        """Whether a weight was repeated along one of its axes, or it is a piece of that: one decay for all steps."""
        followed, op = self.analysis.followed, value.op
        piece = op is not None and op.name in SHAPES
        axes = [*followed.axes[value], *(followed.mixed[op] if op is not None and piece else ())]
        if any(leaf.repeated for axis in axes for leaf in followed.dims.leaves(axis)):
            return True
        return op is not None and piece and any(self._is_repeated(v) for v in op.inputs)

    def _only_moves(self, value: Value) -> bool:
        """Whether it is another view of something that can be cut at as well."""
        op, facts = value.op, self.analysis.facts
        if op is None or op.name not in MOVES or not op.inputs:
            return False
        base = op.inputs[0]
        fact = facts[base]
        if fact.form != facts[value].form or fact.mixed or base.data is not None:
            return False
        if value.dtype.is_floating_point and not (base.dtype.is_floating_point or base.dtype.is_complex):
            return False  # features of zeros and ones
        return base.node is not None or self._only_moves(base)


def _meet(subgraph: Subgraph, followed: Followed) -> None:
    """The axes that are taken feature by feature, one feature of each at a time, are one axis."""
    first: dict[int, Axis] = {}
    for base, dim in subgraph.columns:
        if base in followed.axes:
            axis = followed.axes[base][dim]
            followed.dims.same(first.setdefault(base.shape[dim], axis), axis)
            for leaf in followed.dims.leaves(axis):
                leaf.pinned = True


def _divided(dims: Dims, time: Axis, count: int) -> tuple[Axis, Axis]:
    """Time as the axis of its first `count` parts, and the rest."""
    leaves, size = dims.leaves(time), 1
    for i, leaf in enumerate(leaves):
        if size == count:
            return leaves[:i], leaves[i:]
        size *= leaf.size
    return leaves, ()
