"""Cuts: which parts are tried as the mixer that makes a value, and in which order."""

from __future__ import annotations

from collections.abc import Iterator

from llcompile.patterns.structure.columns import columns
from llcompile.patterns.structure.cut import Cutter, Part
from llcompile.patterns.structure.found import count
from llcompile.patterns.structure.lift import bases_of
from llcompile.patterns.structure.lifted import MOVES, Lifted, Source, origin, sample_of
from llcompile.patterns.structure.program import Value
from llcompile.patterns.structure.tail import Tail, tails

SOURCES = 16  # a mixer has fewer operands
_JOINS = MOVES | {"cat", "stack", "repeat", "constant_pad_nd"}
_WIDENINGS = 12  # how often a cut is moved up


class Cuts:
    """The parts that may be a mixer, of one cutter."""

    def __init__(self, cutter: Cutter) -> None:
        self.cutter, self.times = cutter, cutter.times

    def of(self, value: Value) -> Iterator[tuple[Part, Tail | None]]:
        """The parts to try: of the value, then of what it may be computed from piece by piece."""
        for part in self._parts(value):
            yield part, None
        for tail in tails(value, self.times, self.cutter.lifter):
            for part in self._parts(tail.joined):
                yield part, tail

    def _parts(self, value: Value) -> Iterator[Part]:
        """The cuts to try: the latest that is not inside of a product, then the one behind shared factors."""
        passed: set[Source] = set()
        part: Part | None = None
        for rule in (self._inside, self._squared, self._combined, self._derived):
            part, moved = self.cutter.cut(value, passed), rule == self._inside
            for _ in range(_WIDENINGS):
                further = set() if part is None else rule(part) | self._inside(part)
                if not further:
                    break
                passed, moved = passed | further, True
                part = self.cutter.cut(value, passed)
            if part is None:
                return
            if rule == self._inside:
                first, through = part, passed
            if moved:
                yield part
            if len(part.sources) > SOURCES:
                break
        if part is not None and len(part.sources) < 4:
            apart = self.cutter.cut(value, views=True)
            if apart is not None and len(part.sources) < len(apart.sources) <= SOURCES:
                yield apart
        taken = columns(first, self.times)
        whole = self.cutter.cut(value, through.union(*taken.values())) if taken else None
        if whole is not None:
            whole.columns = list(taken)
            yield whole

    def _inside(self, part: Part) -> set[Source]:
        """Sources that belong to the mixer: outer products of its operands, and what few tokens have."""
        rare = {s for s, taps in part.taps.items() if 2 * len(taps) < s.count + self._is_joined(s)}
        return rare | {s for s in part.sources if self._is_product(s)}

    def _is_joined(self, source: Source) -> bool:
        """Whether it is made of several that depend on data: the first token's output, where there are two tokens."""
        return isinstance(source, Lifted) and sum(map(self._is_data, bases_of(source))) > 1

    def _squared(self, part: Part) -> set[Source]:
        """Outer products of a tensor with itself: features at first, a state where keys and values are one tensor."""
        return {s for s in part.sources if self._is_product(s, squares=True)}

    def _is_product(self, source: Source, squares: bool = False) -> bool:
        """Whether it is larger than all it is made of (k v^T), or computed from such a thing element by element."""
        op, inner = source.op, [p for p in self._inner(source) if self._is_data(p)]
        if not inner:  # powers of a learned decay for the positions of a chunk
            inner = [p for p in self._inner(source) if isinstance(p, Value) and self.times.facts[p].weight]
        if op is None or not inner or self.times.is_projection(op):
            return False
        size, largest = count(sample_of(source).shape), max(count(sample_of(p).shape) for p in inner)
        if op.name not in _JOINS and size > largest and (len(op.inputs) > 1 or op.name == "diag_embed"):
            return squares or len(inner) < 2 or len(set(map(origin, inner))) > 1
        return any(count(sample_of(p).shape) == size and self._is_product(p, squares) for p in inner)

    def _is_data(self, source: Source) -> bool:
        if isinstance(source, Lifted):
            return True
        fact = self.times.facts[source]
        return fact.data and not fact.mixed

    def _inner(self, source: Source) -> list[Source]:
        if isinstance(source, Lifted):
            return [a for a in source.args if isinstance(a, (Lifted, Value))]
        return list(source.op.inputs) if source.op is not None else []

    def _combined(self, part: Part) -> set[Source]:
        """Sources that are computed from another source and something else (k * beta beside k)."""
        return {s for s, (above, alone) in self.origins(part).items() if len(above) > 1 or (above and not alone)}

    def _derived(self, part: Part) -> set[Source]:
        """Sources that are computed from other sources (1 - f beside f, too)."""
        return {s for s, (above, _) in self.origins(part).items() if above}

    def origins(self, part: Part) -> dict[Source, tuple[set[int], bool]]:
        """Source -> the other sources that it is computed from, and whether it is computed from nothing else."""
        others = set(map(id, part.sources))
        return {s: self._above(s, others - {id(s)}) for s in part.sources}

    def _above(self, source: Source, others: set[int]) -> tuple[set[int], bool]:
        pending, seen, found, alone = list(self.cutter.parents(source)), 0, set(), True
        while pending and seen < 60:
            current = pending.pop()
            seen += 1
            if id(current) in others:
                found.add(id(current))
                continue
            if self._is_data(source) and not self._is_data(current):
                continue
            above = self.cutter.parents(current)
            alone = alone and bool(above)
            pending.extend(above)
        return found, alone
