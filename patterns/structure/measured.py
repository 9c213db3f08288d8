"""Measured: what can be seen of a part that was not read, by running it: reaches, weights, which source is which."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llcompile.patterns.structure.axes import Atom
from llcompile.patterns.structure.frame import Frame, Row
from llcompile.patterns.structure.lifted import Source
from llcompile.patterns.structure.probe import Probe
from llcompile.patterns.structure.sizing import arrange

SEEN = 1e-7  # a relative difference that is not rounding
_DEPENDS = 1e-9  # one that shows that a result depends on something

Changes = Mapping[Source, Tensor]


class Measured:
    """A part under a probe.

    No roles are given: which source would be the query, the key and the value is told by what they do, as far as they
    do it.

    Args:
        probe: the part, with one draw.
        origins: source -> the ids of the other sources that the code computes it from.
    """

    def __init__(self, probe: Probe, origins: Mapping[Source, set[int]] | None = None) -> None:
        self.probe, self.origins = probe, origins or {}
        self.length, self.middle = probe.length, probe.length // 2
        self.kept = {id(atom) for row in probe.result for atom in row}
        whole = [s for s in probe.part.sources if probe.values[s].is_floating_point()]
        self.timed = [s for s in whole if probe.is_timed(s)]
        self._others: dict[tuple[Source, int], Tensor] = {}

    def run(self, changed: Changes | None = None) -> Tensor:
        """The result, [T, everything else]."""
        return self.probe.by_time(self.probe.run(changed))

    @functools.cached_property
    def base(self) -> Tensor:
        """The result on the probe's own draw."""
        return self.run()

    def atoms(self, source: Source) -> Row:
        """The source's axes but time."""
        times = self.probe.sizing.times
        return tuple(a for row in self.probe.rows[source] for a in row if not times.is_time(a))

    @functools.cached_property
    def paired(self) -> set[int]:
        """The axes along which two sequences meet and that the result does not have."""
        held = [{id(a) for a in self.atoms(s)} - self.kept for s in self.timed]
        return {a for i, one in enumerate(held) for two in held[:i] for a in one & two}

    def is_paired(self, source: Source) -> bool:
        """Whether the source meets another one along an axis that the result does not have."""
        return bool({id(a) for a in self.atoms(source)} & self.paired)

    # -- what the result depends on

    def reach(self, source: Source, position: int) -> list[int]:
        """The positions of the result that depend on one position of a source."""
        size = self.base.abs().amax(1)
        changed = (self.run({source: self.other(source, position)}) - self.base).abs().amax(1)
        return (changed > _DEPENDS * size).nonzero().flatten().tolist()  # type: ignore[no-any-return]

    def other(self, source: Source, position: int) -> Tensor:
        """The source with other numbers at one position, the same ones each time."""
        key = (source, position)
        if key not in self._others:
            self._others[key] = self.probe.at_one_time(source, position)
        return self._others[key]

    @functools.cached_property
    def readers(self) -> list[Source]:
        """The sources that act on the output of their own position alone."""
        return [s for s in self.timed if self.reach(s, self.middle) == [self.middle] and self.reach(s, 0) in ([], [0])]

    @property
    def pointwise(self) -> bool:
        """Whether every source acts at its own position alone."""
        return len(self.readers) == len(self.timed)

    @functools.cached_property
    def query(self) -> Source | None:
        """What is read with: it acts at its own position, and meets another source along an axis that is summed."""
        found = [s for s in self.readers if self.is_paired(s)]
        # Of two, the one that the result is a sum of.
        found.sort(key=lambda s: (not self.is_additive(s), -len(self.atoms(s))))
        return found[0] if found else None

    @functools.cached_property
    def value(self) -> Source | None:
        """What is summed up: the result is a sum of it, over positions, and it meets no other source."""
        found = [s for s in self.timed if s not in self.readers and not self.is_paired(s) and self.is_additive(s)]
        return max(found, key=lambda s: len(self.atoms(s)), default=None)

    @functools.cached_property
    def keys(self) -> list[Source]:
        """What meets the query and acts on later positions."""
        held = {id(a) for a in self.atoms(self.query)} & self.paired if self.query is not None else set()
        return [s for s in self.timed if s not in self.readers and {id(a) for a in self.atoms(s)} & held]

    def is_additive(self, source: Source) -> bool:
        """Whether the result is a sum over what the source is a sum of (and something that stays)."""
        one, two = self.probe.values[source], self._second(source)
        nothing = self.run({source: torch.zeros_like(one)})
        apart = self.base + self.run({source: two}) - nothing
        together = self.run({source: one + two})
        size = max(float(x.abs().max()) for x in (apart, together, nothing))
        return float((together - apart).abs().max()) < SEEN * size

    def _second(self, source: Source) -> Tensor:
        key = (source, -1)
        if key not in self._others:
            self._others[key] = self.probe.draw(source)
        return self._others[key]

    @functools.cached_property
    def normalised(self) -> bool:
        """Whether the size of a query does not matter, where it is large: the output is divided by its scores."""
        if self.query is None:
            return False
        one, two = (self.run({self.query: size * self.probe.values[self.query]}) for size in (1e7, 2e7))
        return float((two - one).abs().max()) < 1e-5 * float(one.abs().max())

    # -- the weights that values come in with

    def weights(self, position: int, changed: Changes | None = None) -> Tensor:
        """What the value at one position alone adds to the results, [T, N]."""
        assert self.value is not None
        own, other = self.probe.values[self.value], self.other(self.value, position)
        alone = torch.where(other != own, other, torch.zeros_like(own))
        with_it = self.run({**(changed or {}), self.value: alone})
        return with_it - self.run({**(changed or {}), self.value: torch.zeros_like(own)})

    def rows(self, positions: Sequence[int], at: int, changed: Changes | None = None) -> Tensor:
        """The weights of some positions in one result, [N, positions]."""
        return torch.stack([self.weights(p, changed)[at] for p in positions], dim=-1)

    def along(self, source: Source, atoms: Sequence[Atom], index: int, number: float = 1.0) -> Tensor:
        """Numbers of the source's shape that are zero but at one index along some of its axes."""
        of = self.probe.sizing.of
        sizes = [of(a) for a in atoms]
        mask = torch.zeros(sizes, dtype=torch.float64).flatten()
        mask[index] = number
        flat = tuple((a,) for row in self.probe.rows[source] for a in row)
        made = arrange(mask, (tuple(atoms),), flat, of)
        return made.reshape(self.probe.values[source].shape).to(self.probe.dtype).contiguous()

    def contracted(self, source: Source) -> tuple[Atom, ...]:
        """The source's axes that it is summed over with another."""
        return tuple(a for a in self.atoms(source) if id(a) in self.paired)


def meet(rows: Mapping[Source, tuple[Row, ...]], result: tuple[Row, ...], frame: Frame) -> bool:
    """Whether two sequences meet along an axis that the result does not have, as queries and keys do."""
    kept = {id(atom) for row in result for atom in row}
    held = [[atom for row in axes for atom in row] for axes in rows.values()]
    timed = [{id(a) for a in atoms} - kept for atoms in held if any(map(frame.is_time, atoms))]
    times = {id(leaf) for leaf in frame.leaves}
    return any((one & two) - times for i, one in enumerate(timed) for two in timed[:i])
