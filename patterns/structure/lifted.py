"""Lifted: what a loop computes from one token (or one chunk of them), as what it is for all of them at once."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from llcompile.patterns.boundary import NotKnown
from llcompile.patterns.structure.axes import length
from llcompile.patterns.structure.constants import Made, Makers, line_of, numbers_of
from llcompile.patterns.structure.facts import TimeAnalysis
from llcompile.patterns.structure.moves import CUTS, MOVES, PICKS, SHAPES
from llcompile.patterns.structure.nested import leaves, mapped
from llcompile.patterns.structure.program import Op, Row, Value
from llcompile.patterns.structure.rows import Rows

_ARITHMETIC = ("mul", "div", "add", "sub", "rsub", "pow")
_FEW = 4  # pieces; of more, one may go without what the others have


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
class Numbers:
    """A number that code in a loop computes anew for each piece: an angle, `1 / (t + 1)`.

    Args:
        known: position -> the number.
    """

    known: dict[int, float]

    @property
    def single(self) -> float | None:
        """The number, where it is the same for all pieces."""
        found = set(self.known.values())
        return next(iter(found)) if len(found) == 1 else None

    def listed(self, count: int) -> list[float]:
        """One for each of so many pieces; a piece that the code leaves out has any."""
        some = next(iter(self.known.values()))
        return [self.known.get(i, some) for i in range(count)]


@dataclass(eq=False)
class Lifted:
    """What code in a loop computes from one piece of a sequence, for all pieces at once: [N, *shape of one piece's].

    Args:
        op: the operation of the first piece; `args` are its arguments, pieces' values as what they were lifted to.
        base: instead of an operation, where the pieces were taken from.
        made: instead of both, tensors that the code makes anew for each piece.
        index: which of the operation's results it is.
        sample: the value of the first piece seen.
        count: N, the number of pieces.
    """

    op: Op | None
    args: Any = ()
    kwargs: Any = None
    base: Taken | None = None
    made: Made | None = None
    index: int = 0
    sample: Value | None = None
    count: int = 0

    def __repr__(self) -> str:
        return f"[{self.count}]x{self.sample}"

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether it only moves the numbers of a sequence."""
        if self.op is None:
            return self.base is None or not isinstance(self.base.value, Row)
        parents = [a for a in self.args if isinstance(a, Lifted)]
        return self.op.name in SHAPES and all(p.is_plain for p in parents)

    @functools.cached_property
    def has_numbers(self) -> bool:
        """Whether a number of each piece has a part in it."""
        return self.made is not None or any(
            isinstance(a, Numbers) or (isinstance(a, Lifted) and a.has_numbers) for a in leaves(self.args)
        )


LiveIn = Value | Lifted


def sample_of(live_in: LiveIn) -> Value:
    """The value itself, or that of one piece."""
    value = live_in.sample if isinstance(live_in, Lifted) else live_in
    assert value is not None
    return value


def made_of(live_in: LiveIn) -> list[LiveIn]:
    """What the operation that makes it takes."""
    if isinstance(live_in, Lifted):
        return [a for a in leaves(live_in.args) if isinstance(a, (Lifted, Value))]
    return list(live_in.op.inputs) if live_in.op is not None else []


def is_of_rows(live_in: LiveIn) -> bool:
    """Whether a row of what a loop carries has a part in it: it has seen the tokens up to its own."""
    if not isinstance(live_in, Lifted):
        return False
    return isinstance(live_in.base.value, Row) if live_in.base else any(map(is_of_rows, made_of(live_in)))


def origin(live_in: LiveIn) -> object:
    """Equal for two live-ins with the same numbers up to a factor: one of a sequence, the other of its pieces, say."""
    return _origin(live_in, {}, 12)


def _origin(live_in: LiveIn, known: dict[LiveIn, object], depth: int) -> object:
    if isinstance(live_in, Lifted) and live_in.base is not None:
        return _origin(live_in.base.value, known, depth)
    if live_in.op is None or depth == 0:
        return id(live_in)
    if live_in not in known:
        op, args = live_in.op, live_in.args if isinstance(live_in, Lifted) else live_in.op.args
        inner = [a for a in leaves(args) if isinstance(a, (Value, Lifted))]
        above = tuple(_origin(a, known, depth - 1) for a in inner)
        written = tuple(n for n in map(_written, leaves(args)) if n is not None)
        factor = op.name in ("mul", "div") and len(inner) == 1 and not any(isinstance(n, tuple) for n in written)
        moves = op.name in MOVES or factor
        numbers = () if op.name in MOVES else written
        known[live_in] = above[0] if moves and above else (op.target, live_in.index, above, numbers)
    return known[live_in]


def _written(argument: Any) -> Any:
    """A number of the code, or those of all pieces; None for anything else."""
    if isinstance(argument, Numbers):
        return argument.single if argument.single is not None else tuple(sorted(argument.known.items()))
    return argument if isinstance(argument, (int, float)) else None


class Lifter:
    """Tells of the values of pieces what they are pieces of.

    Args:
        analysis: the facts.
        sums: whether a row of what a loop carries may be one that sums up (see `rows`).
    """

    def __init__(self, analysis: TimeAnalysis, sums: bool = False) -> None:
        self.analysis, self.sums = analysis, sums
        self.rows = Rows(analysis, self._position)
        self._lifted: dict[Any, Lifted] = {}
        self._places: dict[Value, tuple[Lifted, int] | None] = {}
        self._rows: dict[Any, set[tuple[int | None, int]]] = {}
        self._constants: dict[tuple[Value, int, int], Lifted | None] = {}
        self._makers = Makers(analysis.program)

    def place(self, value: Value) -> tuple[Lifted, int] | None:
        """A piece's value as what it was lifted to and its position; None where it is more than one piece's."""
        if value not in self._places:
            self._places[value] = self._find(value)
        return self._places[value]

    def _find(self, value: Value) -> tuple[Lifted, int] | None:
        op, facts = value.op, self.analysis.facts
        if op is None or facts[value].mixed:
            return None
        if op.name in CUTS and facts[op.inputs[0]].form == "sequence":
            return self._taken(value, op)
        row = self._of_row(value) if self.analysis.lone and facts[value].form == "pieces" else None
        if row is not None:
            return row
        places = {}
        for parent in op.inputs:
            if facts[parent].form == "timeless" and not facts[parent].data:
                continue
            found = self.place(parent)
            if found is not None:
                places[parent] = found
            elif facts[parent].data:
                return None
        found_at = {(lifted.count, position) for lifted, position in places.values()}
        if len(found_at) != 1:
            return None
        count, position = next(iter(found_at))
        given = {parent: lifted for parent, (lifted, _) in places.items()}
        for parent in op.inputs:
            constant = self.constant(parent, count, position) if parent not in given else None
            if constant is not None:
                given[parent] = constant
            elif parent not in given and facts[parent].form != "timeless":
                return None
        made = self._of_pieces(value, op, given, count)
        return None if made is None or not self._note(made, op, position) else (made, position)

    def _of_row(self, value: Value) -> tuple[Lifted, int] | None:
        """As `place`, for what a loop carries."""
        found = self.rows.of(value)
        if found is None or (self.rows.is_sum(found[0]) and not self.sums):
            return None
        return self.row(found[0]), found[1]

    def row(self, row: Row) -> Lifted:
        """A row of pieces [N, ...], one for each token."""
        key = Taken(row, 0, 0)
        if key not in self._lifted:
            assert row.op is not None
            pieces = row.op.inputs
            self._lifted[key] = Lifted(None, base=key, sample=pieces[-1], count=len(pieces))
        return self._lifted[key]

    def _position(self, value: Value) -> int | None:
        """The token that was taken out of a sequence."""
        assert value.op is not None
        found = self._taken(value, value.op)
        return None if found is None or found[0].count != self.rows.length else found[1]

    def _of_pieces(self, value: Value, op: Op, given: Mapping[Value, Lifted], count: int) -> Lifted | None:
        """What an operation makes of pieces, for all pieces."""
        args, kwargs = mapped(lambda a: given.get(a, a) if isinstance(a, Value) else a, (op.args, op.kwargs))
        rank = -1
        if self._has_own_number(op, count):
            rank, args = self._rank(op, count), (args[0], Numbers({}), *args[2:])
        shape = mapped(self.name, (args, kwargs))
        key = (op.target, op.mode, value.index, rank, repr(shape))
        if key not in self._lifted:
            self._lifted[key] = Lifted(op, args, kwargs, index=value.index, sample=value, count=count)
        return self._lifted[key]

    def name(self, argument: Any, depth: int = 8) -> Any:
        """Equal for arguments that are the same for all pieces, also where each piece has them made anew."""
        if isinstance(argument, Numbers):
            return "#"
        if not isinstance(argument, (Value, Lifted)):
            return argument
        op = None if isinstance(argument, Lifted) else argument.op
        fact = self.analysis.facts.get(argument) if isinstance(argument, Value) else None
        if op is None or fact is None or fact.data or len(op.inputs) > 1 or depth == 0 or op.is_random:
            return id(argument)
        inner = mapped(lambda a: self.name(a, depth - 1), (op.args, op.kwargs))
        return op.target, op.mode, argument.index, repr(inner)

    def _note(self, lifted: Lifted, op: Op, position: int) -> bool:
        """Whether the number of this piece agrees with what is known of it."""
        numbers = lifted.args[1] if len(lifted.args) > 1 else None
        return not isinstance(numbers, Numbers) or numbers.known.setdefault(position, op.args[1]) == op.args[1]

    def _has_own_number(self, op: Op, count: int) -> bool:
        """Whether it has a number that other pieces do not have: fewer of its kind have it than there are pieces."""
        return is_numbered(op) and self._numbered[_call(op)] < (count if count < _FEW else count - 1)

    def _rank(self, op: Op, count: int) -> int:
        """Which of the operations on its piece it is, of those with a number of their own."""
        alike = (o for o in op.args[0].users if o.target is op.target and o.number < op.number)
        return sum(o.args[0] is op.args[0] and self._has_own_number(o, count) for o in alike)

    @functools.cached_property
    def _numbered(self) -> Counter[Any]:
        return Counter(_call(op) for op in self.analysis.program.ops if is_numbered(op))

    def table(self, value: Value, count: int, position: int) -> Lifted | None:
        """What is read off a table that has a row for each piece, `cos[t]`; None for what is the same for all."""
        op, fact = value.op, self.analysis.facts.get(value)
        if op is None or fact is None or fact.data or fact.form != "timeless" or len(op.inputs) != 1:
            return None
        if op.name not in CUTS:
            inner = self.table(op.inputs[0], count, position) if len(op.outputs) == 1 else None
            made = None if inner is None else self._of_pieces(value, op, {op.inputs[0]: inner}, count)
            return made if made is not None and self._note(made, op, position) else None
        base, dim, width, start = piece(value, op)
        if start != position * max(1, width) or base.node is None or not self._is_read_in_turn(base, op, count):
            return None
        key = "table", Taken(base, dim, width), count
        if key not in self._lifted:
            self._lifted[key] = Lifted(None, base=key[1], sample=value, count=count)
        return self._lifted[key]

    def constant(self, value: Value, count: int, position: int) -> Lifted | None:
        """What has other numbers for each piece and nothing of the input in it; None for what is the same for all."""
        key = value, count, position
        if key not in self._constants:
            self._constants[key] = self.table(value, count, position) or self._constant(value, count, position)
        return self._constants[key]

    def _constant(self, value: Value, count: int, position: int) -> Lifted | None:
        op, fact = value.op, self.analysis.facts.get(value)
        if (fact is None and value.data is None) or (fact is not None and fact.data):
            return None
        if op is None or not op.inputs:
            return self._made_anew(value, count, position)
        if len(op.outputs) > 1 or op.is_random:
            return None
        found = {parent: self.constant(parent, count, position) for parent in dict.fromkeys(op.inputs)}
        given = {parent: lifted for parent, lifted in found.items() if lifted is not None}
        if given:
            made: Lifted | None = self._of_pieces(value, op, given, count)
        elif self._has_own_number(op, count):
            args = (op.args[0], Numbers({}), *op.args[2:])
            key = op.target, op.mode, self.name(op.args[0]), repr(op.args[2:]), op.node.meta.get("stack_trace")
            made = self._lifted.setdefault(key, Lifted(op, args, dict(op.kwargs), sample=value, count=count))
        else:
            return None
        return made if made is not None and self._note(made, op, position) else None

    def _made_anew(self, value: Value, count: int, position: int) -> Lifted | None:
        """A tensor that is made of nothing, as those of all pieces."""
        if not self._makers.is_anew(value, count):
            return None
        try:
            numbers = numbers_of(value)
        except NotKnown:
            return None
        key = "made", line_of(value), count
        if key not in self._lifted:
            self._lifted[key] = Lifted(None, made=Made(value, {}), sample=value, count=count)
        made = self._lifted[key].made
        assert made is not None
        return self._lifted[key] if made.known.setdefault(position, numbers) == numbers else None

    def is_data(self, lifted: Lifted) -> bool:
        """Whether the model's input has a part in it; a table that is read row by row is without."""
        fact = self.analysis.facts.get(sample_of(lifted))
        return fact is None or fact.data

    def reads_tables(self, length: int) -> bool:
        """Whether something without the input is read in pieces, all over as many positions."""
        return any(
            read >= length and (fact := self.analysis.facts.get(base)) is not None and not fact.data
            for base, read in self._read_in_pieces.items()
        )

    @functools.cached_property
    def _read_in_pieces(self) -> Counter[Value]:
        """How many rows are read of what is cut."""
        rows: Counter[Value] = Counter()
        for op in self.analysis.program.ops:
            if op.name in CUTS:
                rows[op.inputs[0]] += sum(max(1, piece(value, op).width) for value in op.outputs)
        return rows

    def table_row(self, value: Value, length: int) -> tuple[Lifted, int] | None:
        """What is read off a table with a row for each of `length` tokens, and its position; None for anything else."""
        places = set(self._cuts_above(value))
        if len(places) != 1:
            return None
        start, width = places.pop()
        if start % width or length % width:
            return None
        lifted = self.constant(value, length // width, start // width)
        return None if lifted is None else (lifted, start // width)

    def _cuts_above(self, value: Value, depth: int = 8) -> Iterator[tuple[int, int]]:
        """Where rows begin that a value without the input is computed from, and how many they are."""
        op, fact = value.op, self.analysis.facts.get(value)
        if op is None or fact is None or fact.data or depth == 0:
            return
        if op.name in CUTS:
            _, _, width, start = piece(value, op)
            yield -1 if start is None else start, max(1, width)
            return
        for parent in op.inputs:
            yield from self._cuts_above(parent, depth - 1)

    def _is_read_in_turn(self, base: Value, op: Op, count: int) -> bool:
        """Whether rows of a table are read one after another, as many as there are pieces."""
        key = base, op.name, _dim(op, base)
        if key not in self._rows:
            users = (u for u in base.users if u.name == op.name and u.inputs[0] is base and _dim(u, base) == key[2])
            pieces = (piece(value, user) for user in users for value in user.outputs)
            self._rows[key] = {(found.start, found.width) for found in pieces}
        found, width = self._rows[key], piece(op.outputs[0], op).width
        return all((i * max(1, width), width) in found for i in range(count))

    def _taken(self, value: Value, op: Op) -> tuple[Lifted, int] | None:
        """A piece taken out of a sequence: a token, or one of chunks of equal width."""
        base, dim, width, start = piece(value, op)
        axis, leaves = self.analysis.axes(base)[dim], self.analysis.leaves
        if not axis or self.analysis.facts[base].mixed or axis != leaves[: len(axis)]:
            return None
        # Chunks of what is in chunks already are no pieces that time is made of in order.
        if op.name not in PICKS and (not width or axis != leaves or base.shape[dim] % width):
            return None
        if start is None or (width and start % width):
            return None
        key = Taken(base, dim, width)
        if key not in self._lifted:
            count = length(axis) // max(1, width)
            self._lifted[key] = Lifted(None, base=key, sample=value, count=count)
        return self._lifted[key], start // max(1, width)


def is_numbered(op: Op) -> bool:
    """Whether it does arithmetic with a tensor and a number."""
    return (
        op.name in _ARITHMETIC
        and len(op.inputs) == 1
        and len(op.args) > 1
        and type(op.args[1]) in (int, float)
        and not op.kwargs
        and op.outputs[0].dtype == op.inputs[0].dtype
        and op.outputs[0].dtype.is_floating_point
    )


def _call(op: Op) -> Any:
    """Equal for operations that a loop does with the same number at the same line."""
    return op.target, op.args[1], op.node.meta.get("stack_trace")


class Piece(NamedTuple):
    """What was cut out, along which dimension, how wide (0: picked) and where it begins."""

    base: Value
    dim: int
    width: int
    start: int | None


def piece(value: Value, op: Op) -> Piece:
    """What an operation takes out of a tensor."""
    base, dim = op.inputs[0], _dim(op, op.inputs[0])
    if op.name in PICKS:
        return Piece(base, dim, 0, value.index if op.name == "unbind" else _number(op, 2) % base.shape[dim])
    return Piece(base, dim, value.shape[dim], _start(op, value, base.shape[dim]))


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
