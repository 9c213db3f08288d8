"""Lifted: what a loop computes from one token (or one chunk of them), as what it is for all of them at once."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from llcompile.passes.structure.facts import Times
from llcompile.passes.structure.nested import leaves, mapped
from llcompile.passes.structure.program import Op, Value

# Operations that keep all numbers as they are.
_MOVES = "view _unsafe_view reshape permute transpose t unsqueeze squeeze expand clone contiguous _to_copy alias"
MOVES = frozenset(_MOVES.split())
# Those and the ones that keep some.
SHAPES = MOVES | frozenset(["slice", "select", "unbind", "split", "split_with_sizes"])
_PICKS = ("select", "unbind")
_CUTS = ("slice", "split", "split_with_sizes")


class Taken(NamedTuple):
    """How pieces were taken from a sequence.

    Args:
        value: the sequence.
        dim: its dimension that was cut.
        width: positions in a piece; 0 where a piece is one position and does not have the dimension any more.
    """

    value: Value
    dim: int
    width: int


@dataclass(eq=False)
class Lifted:
    """What code in a loop computes from one piece of a sequence, for all pieces at once: [N, *shape of one piece's].

    Args:
        op: the operation of the first piece; `args` are its arguments, pieces' values as what they were lifted to.
        base: instead of an operation, where the pieces were taken from.
        index: which of the operation's results it is.
        sample: the value of the first piece seen.
        count: N, the number of pieces.
    """

    op: Op | None
    args: Any = ()
    kwargs: Any = None
    base: Taken | None = None
    index: int = 0
    sample: Value | None = None
    count: int = 0

    def __repr__(self) -> str:
        return f"[{self.count}]x{self.sample}"

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether it only moves the numbers of a sequence."""
        if self.op is None:
            return True
        parents = [a for a in self.args if isinstance(a, Lifted)]
        return self.op.name in SHAPES and all(p.is_plain for p in parents)


Source = Value | Lifted


def sample_of(source: Source) -> Value:
    """The value itself, or that of one piece."""
    value = source.sample if isinstance(source, Lifted) else source
    assert value is not None
    return value


def origin(source: Source) -> object:
    """Equal for two sources with the same numbers up to a factor: one of a sequence, the other of its pieces, say."""
    return _origin(source, {}, 12)


def _origin(source: Source, known: dict[Source, object], depth: int) -> object:
    if isinstance(source, Lifted) and source.base is not None:
        return _origin(source.base.value, known, depth)
    if source.op is None or depth == 0:
        return id(source)
    if source not in known:
        op, args = source.op, source.args if isinstance(source, Lifted) else source.op.args
        inner = [a for a in leaves(args) if isinstance(a, (Value, Lifted))]
        above = tuple(_origin(a, known, depth - 1) for a in inner)
        moves = op.name in MOVES or (op.name in ("mul", "div") and len(inner) == 1)
        numbers = tuple(a for a in leaves(args) if isinstance(a, (int, float))) if op.name not in MOVES else ()
        known[source] = above[0] if moves and above else (op.target, source.index, above, numbers)
    return known[source]


class Lifter:
    """Tells of the values of pieces what they are pieces of."""

    def __init__(self, times: Times) -> None:
        self.times = times
        self._lifted: dict[Any, Lifted] = {}
        self._places: dict[Value, tuple[Lifted, int] | None] = {}

    def place(self, value: Value) -> tuple[Lifted, int] | None:
        """A piece's value as what it was lifted to and its position; None where it is more than one piece's."""
        if value not in self._places:
            self._places[value] = self._find(value)
        return self._places[value]

    def _find(self, value: Value) -> tuple[Lifted, int] | None:
        op, facts = value.op, self.times.facts
        if op is None or facts[value].mixed:
            return None
        if op.name in (*_PICKS, *_CUTS) and facts[op.inputs[0]].form == "sequence":
            return self._taken(value, op)
        places = {}
        for parent in op.inputs:
            if facts[parent].form == "timeless" and not facts[parent].data:
                continue
            found = self.place(parent)
            if found is None:
                return None
            places[parent] = found
        found_at = {(lifted.count, position) for lifted, position in places.values()}
        if len(found_at) != 1:
            return None
        args, kwargs = mapped(
            lambda a: places[a][0] if isinstance(a, Value) and a in places else a, (op.args, op.kwargs)
        )
        shape = mapped(lambda a: id(a) if isinstance(a, (Value, Lifted)) else a, (args, kwargs))
        count, position = next(iter(found_at))
        key = (op.target, op.mode, value.index, repr(shape))
        if key not in self._lifted:
            self._lifted[key] = Lifted(op, args, kwargs, index=value.index, sample=value, count=count)
        return self._lifted[key], position

    def _taken(self, value: Value, op: Op) -> tuple[Lifted, int] | None:
        """A piece taken out of a sequence: a token, or one of chunks of equal width."""
        base = op.inputs[0]
        dim = _dim(op, base)
        row, leaves = self.times.axis_leaves(self.times.followed.axes[base][dim]), self.times.leaves
        if not row or self.times.facts[base].mixed or row != leaves[: len(row)]:
            return None
        if op.name in _PICKS:
            width = 0
            start: int | None = value.index if op.name == "unbind" else _number(op, 2) % base.shape[dim]
        else:
            width, start = value.shape[dim], _start(op, value, base.shape[dim])
            # Chunks of what is in chunks already are no pieces that time is made of in order.
            if start is None or not width or start % width or base.shape[dim] % width or row != leaves:
                return None
        key = Taken(base, dim, width)
        if key not in self._lifted:
            count = math.prod(leaf.size for leaf in row) // max(1, width)
            self._lifted[key] = Lifted(None, base=key, sample=value, count=count)
        return self._lifted[key], (start or 0) // max(1, width)


def _dim(op: Op, base: Value) -> int:
    at = 2 if op.name in ("split", "split_with_sizes") else 1
    return _number(op, at) % len(base.shape)


def _number(op: Op, at: int) -> int:
    return int(op.args[at] if len(op.args) > at else op.kwargs.get("dim", 0))


def _start(op: Op, value: Value, length: int) -> int | None:
    """Where a cut begins; None where it takes every second position, or the like."""
    if op.name == "split":
        return int(value.index * op.args[1])
    if op.name == "split_with_sizes":
        return int(sum(op.args[1][: value.index]))
    if len(op.args) > 4 and op.args[4] != 1:
        return None
    start = op.args[2] if len(op.args) > 2 and op.args[2] is not None else 0
    return int(start + length if start < 0 else start)
