"""Pieces: brings the draws of a proof to both sides of every number at which the code changes what it does.

A clamp at 100, the epsilon of a denominator, a rectifier: on generic numbers each does one thing only, and the operator
may agree with that and not with the other. Where bounds on what comes in show that a piece is never used, it is idle.
Elsewhere the sources are made larger, smaller or of the other sign until both sides are seen, and the proof is repeated
there. What can be neither shown nor reached is no mixer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from llcompile.patterns import reasons
from llcompile.patterns.structure.classify import Miss
from llcompile.patterns.structure.cut import Part
from llcompile.patterns.structure.grammar import pieces, stranger
from llcompile.patterns.structure.lifted import Source
from llcompile.patterns.structure.probe import Probe
from llcompile.patterns.structure.program import Op, Value
from llcompile.patterns.structure.ranges import Range
from llcompile.patterns.structure.reading import Reading
from llcompile.torch_internals.places import user_line

_MARGIN = 3.0  # how far beyond a number draws are brought

Compare = Callable[[Probe], float | None]


@dataclass(frozen=True)
class Crossing:
    """An operation that has two pieces, and the numbers where they meet which may be crossed."""

    op: Op
    numbers: tuple[float, ...]

    @property
    def words(self) -> dict[str, str]:
        """The operation and its line, for a reason."""
        return {"operation": self.op.name, "where": user_line(self.op.node.meta)}


def expect_known(part: Part) -> None:
    """Only operations that a proof by draws can speak of.

    Raises:
        Miss: with the first other one, and its line.
    """
    for op in _dependent(part):
        problem = stranger(op, user_line(op.node.meta))
        if problem is not None:
            raise Miss(problem, 3)


def expect_pieces(
    part: Part, reading: Reading, probe: Probe, bounds: Mapping[Value, Range], error: Compare, budget: float
) -> int:
    """The proof on both sides of every number at which the code changes what it does; returns the draws it took.

    Args:
        part: the part.
        reading: what it is supposed to be.
        probe: a draw; left as it was.
        bounds: the range of every value of the program.
        error: a probe -> how far the part and the operator are apart on its draw; None where the part overflows.
        budget: how far they may be.

    Raises:
        Miss: they differ there, or there is no draw that gets there.
    """
    kept, draws = probe.values, 0
    try:
        for crossing in _crossings(part, bounds):
            open_numbers = set(crossing.numbers)
            for values in _draws(crossing, reading, probe, kept):
                probe.values = values
                crossed = _crossed(probe, crossing, open_numbers) if _within(probe, values) else set()
                apart = error(probe) if crossed else None
                if apart is None:
                    continue
                draws += 1
                if apart > budget:
                    raise Miss(reasons.ACTS_INSIDE(**crossing.words), 3)
                open_numbers -= crossed
                if not open_numbers:
                    break
            if open_numbers:
                raise Miss(reasons.NOT_SHOWN_IDLE(**crossing.words), 3)
    finally:
        probe.values = kept
    return draws


def _dependent(part: Part) -> Iterator[Op]:
    """The operations that something that comes in has a part in."""
    depends: set[Value] = {s for s in part.sources if isinstance(s, Value)}
    depends.update(value for taps in part.taps.values() for value in taps)
    for op in part.ops:
        if not depends.isdisjoint(op.inputs):
            depends.update(op.outputs)
            yield op


def _crossings(part: Part, bounds: Mapping[Value, Range]) -> list[Crossing]:
    """What has pieces and is not idle; of an unrolled loop the last turn."""
    found: dict[object, Crossing] = {}
    for op in _dependent(part):
        low, high = _range(op, bounds)
        numbers = tuple(n for n in pieces(op) if low < n < high)
        if numbers:
            found[user_line(op.node.meta), op.name, numbers] = Crossing(op, numbers)
    return list(found.values())


def _range(op: Op, bounds: Mapping[Value, Range]) -> Range:
    """The range of what is compared with the numbers."""
    whole = (-float("inf"), float("inf"))
    first, *others = (bounds.get(v, whole) for v in op.inputs)
    return (first[0] - others[0][1], first[1] - others[0][0]) if others else first


def _compared(probe: Probe, op: Op) -> Tensor:
    numbers = [probe.numbers_of(value) for value in op.inputs[:2]]
    return numbers[0] if len(numbers) == 1 else numbers[0] - numbers[1]


def _crossed(probe: Probe, crossing: Crossing, numbers: set[float]) -> set[float]:
    """The numbers that this draw has something on both sides of."""
    x = _compared(probe, crossing.op)
    return {n for n in numbers if bool((x < n).any()) and bool((x > n).any())}


def _draws(
    crossing: Crossing, reading: Reading, probe: Probe, kept: Mapping[Source, Tensor]
) -> Iterator[dict[Source, Tensor]]:
    """Draws that may get there, the draw as it is first."""
    yield dict(kept)
    x = _compared(probe, crossing.op).double().abs()
    middle, largest = float(x.median()), float(x.max())
    for source in (s for s in (reading.value, reading.query, reading.key, *_others(reading)) if s is not None):
        for number in crossing.numbers:
            for factor in _factors(abs(number), middle, largest):
                yield {**kept, source: _times(reading, source, kept[source], factor)}
        yield {**kept, source: _turned(probe, source, kept[source])}


def _others(reading: Reading) -> list[Source | None]:
    return [reading.decay, *(s for s, _ in reading.factors), *(s for s, _ in reading.post), reading.beta]


def _factors(number: float, middle: float, largest: float) -> list[float]:
    """What brings numbers about as large as these to both sides of one."""
    if number == 0 or middle == 0:
        return []
    return [number / middle, _MARGIN * number / largest]


def _times(reading: Reading, source: Source, x: Tensor, factor: float) -> Tensor:
    """A source made larger; of a decay, the log decay."""
    if source is reading.decay and reading.transform is not None:
        log_decay = reading.transform.log_decay(x.double())
        return reading.transform.inverse(log_decay * max(factor, 1.0)).to(x.dtype)
    return x * factor


def _turned(probe: Probe, source: Source, x: Tensor) -> Tensor:
    """A source with the other sign, as far as its range has it."""
    low, _ = probe.ranges[source]
    return -x * min(1.0, 0.9 * abs(low) / float(x.abs().max().clamp_min(1e-30))) if low < 0 else x


def _within(probe: Probe, values: Mapping[Source, Tensor]) -> bool:
    """Whether a draw is one that the code can meet."""
    for source, x in values.items():
        low, high = probe.ranges[source]
        if x.is_floating_point() and not (low <= float(x.min()) and float(x.max()) <= high):
            return False
    return True
