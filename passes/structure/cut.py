"""Cut: the part of the program that makes one value out of values that are pointwise in time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch.utils._pytree import tree_map

from llcompile.passes.structure.axes import Atom, Atoms, Axes, Axis
from llcompile.passes.structure.facts import Times
from llcompile.passes.structure.follow import follow
from llcompile.passes.structure.frame import Frame, Row
from llcompile.passes.structure.program import Op, Value

# Operations that keep all numbers as they are.
_MOVES = "view _unsafe_view reshape permute transpose t unsqueeze squeeze expand clone contiguous _to_copy alias"
MOVES = frozenset(_MOVES.split())
# Those and the ones that keep some.
SHAPES = MOVES | frozenset(["slice", "select", "unbind", "split", "split_with_sizes"])


@dataclass(eq=False)
class Lifted:
    """What code in a token loop computes from one token, for all tokens at once: [T, *shape of one token's].

    Args:
        op: the operation of the first token; `args` are its arguments, tokens' values as what they were lifted to.
        base: instead of an operation, the sequence that the tokens were taken from, and its time dimension.
        index: which of the operation's results it is.
        sample: the value of the first token seen.
    """

    op: Op | None
    args: Any = ()
    kwargs: Any = None
    base: tuple[Value, int, bool] | None = None
    index: int = 0
    sample: Value | None = None

    def __repr__(self) -> str:
        return f"[T]x{self.sample}"

    @property
    def is_plain(self) -> bool:
        """Whether it only moves the numbers of a sequence."""
        if self.op is None:
            return True
        parents = [a for a in self.args if isinstance(a, Lifted)]
        return self.op.name in SHAPES and all(p.is_plain for p in parents)


Source = Value | Lifted


@dataclass
class Part:
    """The operations between a cut and a value.

    Args:
        result: the value.
        sources: the cut: what comes in.
        ops: the operations, in order.
        taps: lifted source -> the values of single tokens that it stands for, with their positions.
    """

    result: Value
    sources: list[Source]
    ops: list[Op]
    taps: dict[Lifted, dict[Value, int]] = field(default_factory=dict)


class Cutter:
    """Cuts parts out of a program, as close to where times are mixed as it is allowed to."""

    def __init__(self, times: Times) -> None:
        self.times = times
        self.views = False
        self._lifted: dict[Any, Lifted] = {}
        self._places: dict[Value, tuple[Lifted, int] | None] = {}

    @property
    def length(self) -> int:
        """The number of positions."""
        return math.prod(leaf.size for leaf in self.times.leaves)

    def cut(
        self, result: Value, passed: Iterable[Source] = (), views: bool = False, limit: int = 200_000
    ) -> Part | None:
        """The part that makes `result`; None for more operations than `limit`.

        Values in `passed` are not cut at, but what they are made of. With `views`, two views of one tensor are two
        sources: queries that are the keys as well.
        """
        self.views = views
        through = set(passed)
        sources: dict[Source, None] = {}
        ops: dict[Op, None] = {}
        taps: dict[Lifted, dict[Value, int]] = {}
        pending, seen = [result], {result}
        while pending:
            value = pending.pop()
            source = None if value is result else self._source(value, through, taps)
            if source is not None:
                sources.setdefault(source)
                continue
            if value.op is None:
                if value.data is None:
                    sources.setdefault(value)
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
        return Part(result, list(sources), sorted(ops, key=lambda op: op.number), taps)

    def frame(self, part: Part) -> tuple[Frame, dict[Source, tuple[Row, ...]]]:
        """The part's own axes, and those of its sources.

        New ones: in the whole program two axes can be the same only because they were cut from one tensor (the keys and
        values of a fused projection).
        """
        atoms = Atoms()
        times = self.times
        time = atoms.new(math.prod(leaf.size for leaf in times.leaves))
        axes: dict[Value, Axes] = {}
        taken: dict[Value, Axis] = {}
        sources: dict[Source, Axes] = {}
        for source in part.sources:
            if isinstance(source, Value):
                axes[source] = sources[source] = self._renewed(atoms, time, times.followed.axes[source])
                continue
            assert source.sample is not None
            token = self._renewed(atoms, time, times.followed.axes[source.sample])
            sources[source] = (time, *token)
            for value in (source.sample, *part.taps[source]):
                axes[value], taken[value] = token, time
        frame = Frame(follow(part.ops, axes, atoms, taken), time)
        return frame, {source: frame.rows(found) for source, found in sources.items()}

    def _renewed(self, atoms: Atoms, time: Axis, axes: Axes) -> Axes:
        """New axes for a source. Time is shared; where the source has it in chunks, the part's time is split alike."""
        places = {id(leaf): i for i, leaf in enumerate(self.times.leaves)}
        if any(0 < sum(id(leaf) in places for leaf in row) < len(places) for row in self.times.rows(axes)):
            atoms.regroup((time,), [leaf.size for leaf in self.times.leaves])
        made = []
        for row in self.times.rows(axes):
            axis: list[Atom] = []
            for leaf in row:
                if id(leaf) in places:
                    inner = atoms.leaves(time)
                    axis.extend(
                        [inner[places[id(leaf)]]]
                        if len(inner) == len(places)
                        else inner
                        if not places[id(leaf)]
                        else []
                    )
                    continue
                new = atoms.new(leaf.size)[0]
                new.weight = leaf.weight
                axis.append(new)
            made.append(tuple(axis))
        return tuple(made)

    def parents(self, source: Source) -> list[Source]:
        """What a source is computed from, if it can be cut there."""
        if isinstance(source, Lifted):
            return [
                a.base[0] if isinstance(a, Lifted) and a.base else a
                for a in source.args
                if isinstance(a, (Lifted, Value))
            ]
        return list(source.op.inputs) if source.op is not None else []

    def _source(self, value: Value, through: set[Source], taps: dict[Lifted, dict[Value, int]]) -> Source | None:
        fact = self.times.facts[value]
        if value.data is not None or fact.mixed:
            return None
        if fact.form == "pieces":
            lifted = self._place(value) if fact.data else None
            if lifted is None or lifted[0].is_plain or lifted[0] in through:
                return None
            if not self.views and lifted[0].op is not None and lifted[0].op.name in MOVES:
                return None
            taps.setdefault(lifted[0], {})[value] = lifted[1]
            return lifted[0]
        if value.node is None or value in through or (not self.views and self._only_moves(value)):
            return None
        return value if fact.data or (fact.weight and fact.form == "timeless") else None

    def _only_moves(self, value: Value) -> bool:
        """Whether it is another view of something that can be cut at as well."""
        op, facts = value.op, self.times.facts
        if op is None or op.name not in MOVES or not op.inputs:
            return False
        base = op.inputs[0]
        fact = facts[base]
        if fact.form != facts[value].form or fact.mixed or base.data is not None:
            return False
        return base.node is not None or self._only_moves(base)

    def _place(self, value: Value) -> tuple[Lifted, int] | None:
        """A token's value as what it was lifted to and its position; None where it is more than one token's."""
        if value not in self._places:
            self._places[value] = self._find_place(value)
        return self._places[value]

    def _find_place(self, value: Value) -> tuple[Lifted, int] | None:
        op, facts = value.op, self.times.facts
        if op is None or facts[value].mixed:
            return None
        if op.name in ("select", "unbind", "slice") and facts[op.inputs[0]].form == "sequence":
            return self._taken(value, op)
        places = {}
        for parent in op.inputs:
            if facts[parent].form == "timeless" and not facts[parent].data:
                continue
            found = self._place(parent)
            if found is None:
                return None
            places[parent] = found
        positions = {position for _, position in places.values()}
        if len(positions) != 1:
            return None
        args, kwargs = tree_map(
            lambda a: places[a][0] if isinstance(a, Value) and a in places else a, (op.args, op.kwargs)
        )
        shape = tree_map(lambda a: id(a) if isinstance(a, (Value, Lifted)) else a, (args, kwargs))
        key = (op.target, value.index, repr(shape))
        if key not in self._lifted:
            self._lifted[key] = Lifted(op, args, kwargs, index=value.index, sample=value)
        return self._lifted[key], next(iter(positions))

    def _taken(self, value: Value, op: Op) -> tuple[Lifted, int] | None:
        """A token taken out of a sequence."""
        base = op.inputs[0]
        dim = int(op.args[1] if len(op.args) > 1 else 0) % len(base.shape)
        if not any(self.times.is_time(leaf) for leaf in self.times.axis_leaves(self.times.followed.axes[base][dim])):
            return None
        if tuple(self.times.axis_leaves(self.times.followed.axes[base][dim])) != self.times.leaves:
            return None
        if op.name == "slice" and value.shape[dim] != 1:
            return None
        position = value.index if op.name == "unbind" else int(op.args[2] if len(op.args) > 2 else 0)
        if self.times.facts[base].mixed:
            return None
        key = (base, dim, op.name == "slice")
        if key not in self._lifted:
            self._lifted[key] = Lifted(None, base=key, sample=value)
        return self._lifted[key], position % base.shape[dim]
