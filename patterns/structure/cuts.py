"""Cuts: which subgraphs are tried as the mixer that makes a value, and in which order."""

from __future__ import annotations

import math
from collections.abc import Iterator

from llcompile.patterns.structure.columns import columns
from llcompile.patterns.structure.cut import Cutter, Subgraph
from llcompile.patterns.structure.lift import bases_of
from llcompile.patterns.structure.lifted import Lifted, Lifter, LiveIn, made_of, origin, sample_of
from llcompile.patterns.structure.moves import MOVES
from llcompile.patterns.structure.program import Value
from llcompile.patterns.structure.tail import Kind, Tail, tails

SOURCES = 16  # a mixer has fewer operands
_JOINS = MOVES | {"cat", "stack", "repeat", "constant_pad_nd"}
_SUMS = {"add", "sub", "rsub"}  # features of all pairs, or a bias for each row: no product of a key and a value
_WIDENINGS = 12  # how often a cut is moved up


class Cuts:
    """The subgraphs that may be a mixer, of one cutter.

    Args:
        cutter: the cutter.
        kind: what a row of pieces is (see `tails`), where operands may mix tokens.
    """

    def __init__(self, cutter: Cutter, kind: Kind | None = None) -> None:
        self.cutter, self.analysis, self.kind = cutter, cutter.analysis, kind
        self._lifter = Lifter(self.analysis, sums=True)

    def of(self, value: Value) -> Iterator[tuple[Subgraph, Tail | None]]:
        """The subgraphs to try: of the value, then of what it may be computed from piece by piece."""
        for subgraph in self.parts(value):
            yield subgraph, None
        for tail in tails(value, self.analysis, self._lifter, self.kind):
            for subgraph in self.parts(tail.joined):
                yield subgraph, tail
        if not self.cutter.lifter.reads_tables(self.cutter.length):
            return
        for subgraph in self._of_rows(value):
            yield subgraph, None
        for tail in tails(value, self.analysis, self._lifter, self.kind):
            for subgraph in self._of_rows(tail.joined):
                yield subgraph, tail

    def _of_rows(self, value: Value) -> Iterator[Subgraph]:
        """The cuts at which a table that is read row by row is a sequence: tried where all others failed."""
        first = self.cutter.cut(value, rows=True)
        if first is not None and not all(map(self._is_data, first.taps)):
            yield from self.parts(value, rows=True)

    def parts(self, value: Value, rows: bool = False) -> Iterator[Subgraph]:
        """The cuts to try: the latest that is not inside of a product, then the one behind shared factors."""
        passed, squares = set[LiveIn](), set[LiveIn]()
        subgraph: Subgraph | None = None
        for rule in (self._inside, self._squared, self._combined, self._derived):
            subgraph, moved = self.cutter.cut(value, passed, rows=rows), rule == self._inside
            for _ in range(_WIDENINGS):
                further = set() if subgraph is None else rule(subgraph) | self._inside(subgraph)
                if not further:
                    break
                passed, moved = passed | further, True
                subgraph = self.cutter.cut(value, passed, rows=rows)
            if subgraph is None:
                return
            if rule == self._inside:
                first, through = subgraph, passed
            elif rule == self._squared:
                squares = passed
            if moved:
                yield subgraph
            if len(subgraph.live_ins) > SOURCES:
                break
        if subgraph is not None and len(subgraph.live_ins) < 4:
            for beyond in (through, squares) if squares > through else (through,):
                apart = self._by_views(value, beyond, rows)
                if apart is not None and len(subgraph.live_ins) < len(apart.live_ins) <= SOURCES:
                    yield apart
        taken = columns(first, self.analysis)
        whole = self.cutter.cut(value, through.union(*taken.values()), rows=rows) if taken else None
        if whole is not None:
            whole.columns = list(taken)
            yield whole

    def _by_views(self, value: Value, passed: set[LiveIn], rows: bool) -> Subgraph | None:
        """The cut at views of tensors."""
        for _ in range(_WIDENINGS):
            subgraph = self.cutter.cut(value, passed, views=True, rows=rows)
            further = set() if subgraph is None else self._rare(subgraph)
            if not further:
                break
            passed = passed | further
        return subgraph

    def _inside(self, subgraph: Subgraph) -> set[LiveIn]:
        """Live-ins that belong to the mixer: outer products of its operands, and what few tokens have."""
        return self._rare(subgraph) | {s for s in subgraph.live_ins if self.is_product(s)}

    def _rare(self, subgraph: Subgraph) -> set[LiveIn]:
        return {s for s, taps in subgraph.taps.items() if 2 * len(taps) < s.count + self._is_joined(s)}

    def _is_joined(self, live_in: LiveIn) -> bool:
        """Whether it is made of several that depend on data: the first token's output, where there are two tokens."""
        return isinstance(live_in, Lifted) and sum(map(self._is_data, bases_of(live_in))) > 1

    def _squared(self, subgraph: Subgraph) -> set[LiveIn]:
        """Outer products of one tensor, with itself or with a weight: features or decays at first, then a state."""
        return {s for s in subgraph.live_ins if self.is_product(s, squares=True)}

    def is_product(self, live_in: LiveIn, squares: bool = False) -> bool:
        """Whether it is larger than all it is made of (k v^T), or computed from such a thing element by element."""
        op, inner = live_in.op, [p for p in made_of(live_in) if self._is_data(p)]
        if not inner:  # powers of a learned decay for the positions of a chunk
            inner = [p for p in made_of(live_in) if isinstance(p, Value) and self.analysis.facts[p].weight]
        if op is None or not inner or self.analysis.is_projection(op):
            return False
        size, largest = math.prod(sample_of(live_in).shape), max(math.prod(sample_of(p).shape) for p in inner)
        if op.name not in _JOINS | _SUMS and size > largest and (len(op.inputs) > 1 or op.name == "diag_embed"):
            apart = not self._is_data(inner[0]) or len(op.inputs) < 2 or len(set(map(origin, inner))) > 1
            return squares or apart
        return any(math.prod(sample_of(p).shape) == size and self.is_product(p, squares) for p in inner)

    def is_scaled(self, live_in: LiveIn) -> bool:
        """Whether it is a product with a factor that depends on the input and is smaller than it."""
        if live_in.op is None or live_in.op.name != "mul":
            return False
        size = math.prod(sample_of(live_in).shape)
        return any(math.prod(sample_of(p).shape) < size for p in made_of(live_in) if self._is_data(p))

    def _is_data(self, live_in: LiveIn) -> bool:
        if isinstance(live_in, Lifted):
            return self.cutter.lifter.is_data(live_in)
        fact = self.analysis.facts[live_in]
        return fact.data and not fact.mixed

    def _combined(self, subgraph: Subgraph) -> set[LiveIn]:
        """Live-ins that are computed from another live-in and something else (k * beta beside k)."""
        return {s for s, (above, alone) in self.origins(subgraph).items() if len(above) > 1 or (above and not alone)}

    def _derived(self, subgraph: Subgraph) -> set[LiveIn]:
        """Live-ins that are computed from other live-ins (1 - f beside f, too)."""
        return {s for s, (above, _) in self.origins(subgraph).items() if above}

    def origins(self, subgraph: Subgraph) -> dict[LiveIn, tuple[set[LiveIn], bool]]:
        """Live-in -> the other live-ins that it is computed from, and whether it is computed from nothing else."""
        return {s: self._above(s, {*subgraph.live_ins} - {s}) for s in subgraph.live_ins}

    def _above(self, live_in: LiveIn, others: set[LiveIn]) -> tuple[set[LiveIn], bool]:
        found: set[LiveIn] = set()
        pending, seen, alone = list(self.cutter.parents(live_in)), 0, True
        while pending and seen < 60:
            current = pending.pop()
            seen += 1
            if current in others:
                found.add(current)
                continue
            if self._is_data(live_in) and not self._is_data(current):
                continue
            above = self.cutter.parents(current)
            alone = alone and bool(above)
            pending.extend(above)
        return found, alone
