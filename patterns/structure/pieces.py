"""Pieces: brings the draws of a proof to both sides of every number at which the code changes what it does.

A clamp at 100, the epsilon of a denominator, a rectifier: on generic numbers each does one thing only, and the operator
may agree with that and not with the other. Where bounds on what comes in rule a piece out, it is idle. Elsewhere the
live-ins are made larger, smaller or of the other sign until both sides are seen, and the proof is repeated there. What
can be neither shown nor reached is no mixer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from llcompile.patterns import reasons
from llcompile.patterns.structure.classify import Rejection
from llcompile.patterns.structure.cut import Subgraph
from llcompile.patterns.structure.grammar import pieces, stranger
from llcompile.patterns.structure.hypothesis import Hypothesis
from llcompile.patterns.structure.lifted import LiveIn
from llcompile.patterns.structure.probe import Probe
from llcompile.patterns.structure.program import Op, Value
from llcompile.patterns.structure.ranges import Range
from llcompile.torch_internals.places import user_line

_MARGIN = 3.0  # how far beyond a number draws are brought
_CHANCES = 8  # draws of which one should have the larger of two numbers on the other side

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


def expect_known(subgraph: Subgraph) -> None:
    """Only operations that a proof by draws can speak of.

    Raises:
        Rejection: with the first other one, and its line.
    """
    for op in _dependent(subgraph):
        problem = stranger(op, user_line(op.node.meta))
        if problem is not None:
            raise Rejection(problem, 3)


def expect_pieces(
    subgraph: Subgraph,
    hypothesis: Hypothesis,
    probe: Probe,
    bounds: Mapping[Value, Range],
    error: Compare,
    budget: float,
) -> int:
    """The proof on both sides of every number at which the code changes what it does; returns the draws it took.

    Args:
        subgraph: the subgraph.
        hypothesis: what it is supposed to be.
        probe: a draw; left as it was.
        bounds: the range of every value of the program.
        error: a probe -> how far the two are apart on its draw; None where the subgraph overflows.
        budget: how far they may be.

    Raises:
        Rejection: they differ there, or there is no draw that gets there.
    """
    kept, draws = probe.values, 0
    try:
        for crossing in _crossings(subgraph, bounds):
            unseen = {(number, side) for number in crossing.numbers for side in (-1, 1)}
            for values in _draws(crossing, hypothesis, probe, kept):
                probe.values = values
                seen = _seen(probe, crossing, unseen) if _within(probe, values) else set()
                apart = error(probe) if seen else None
                if apart is None:
                    continue
                draws += 1
                if apart > budget:
                    raise Rejection(reasons.ACTS_INSIDE(**crossing.words), 3)
                unseen -= seen
                if not unseen:
                    break
            if unseen:
                raise Rejection(reasons.NOT_SHOWN_IDLE(**crossing.words), 3)
    finally:
        probe.values = kept
    return draws


def _dependent(subgraph: Subgraph) -> Iterator[Op]:
    """The operations that something that comes in has a part in."""
    depends: set[Value] = {s for s in subgraph.live_ins if isinstance(s, Value)}
    depends.update(value for taps in subgraph.taps.values() for value in taps)
    for op in subgraph.ops:
        if not depends.isdisjoint(op.inputs):
            depends.update(op.outputs)
            yield op


def _crossings(subgraph: Subgraph, bounds: Mapping[Value, Range]) -> list[Crossing]:
    """What has pieces and is not idle; of an unrolled loop the last turn."""
    found: dict[object, Crossing] = {}
    for op in _dependent(subgraph):
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


def _seen(probe: Probe, crossing: Crossing, sides: set[tuple[float, int]]) -> set[tuple[float, int]]:
    """Those of the sides of numbers that this draw has something on."""
    x = _compared(probe, crossing.op)
    return {(n, side) for n, side in sides if bool((x < n if side < 0 else x > n).any())}


def _draws(
    crossing: Crossing, hypothesis: Hypothesis, probe: Probe, kept: Mapping[LiveIn, Tensor]
) -> Iterator[dict[LiveIn, Tensor]]:
    """Draws that may get there, the draw as it is first."""
    yield dict(kept)
    x = _compared(probe, crossing.op).double().abs()
    middle, largest = float(x.median()), float(x.max())
    for live_in in (
        s for s in (hypothesis.value, hypothesis.query, hypothesis.key, *_others(hypothesis)) if s is not None
    ):
        for number in crossing.numbers:
            for factor in _factors(abs(number), middle, largest):
                yield {**kept, live_in: _times(hypothesis, live_in, kept[live_in], factor)}
        yield {**kept, live_in: _turned(probe, live_in, kept[live_in])}
    # Of two numbers that are compared with each other, which one is larger is left to chance.
    if 0.0 in crossing.numbers:
        for _ in range(_CHANCES):
            yield {s: x if s is hypothesis.decay else probe.draw(s) for s, x in kept.items()}


def _others(hypothesis: Hypothesis) -> list[LiveIn | None]:
    return [hypothesis.decay, *(s for s, _ in hypothesis.factors), *(s for s, _ in hypothesis.post), hypothesis.beta]


def _factors(number: float, middle: float, largest: float) -> list[float]:
    """What brings numbers about as large as these to both sides of one."""
    if number == 0 or middle == 0:
        return []
    return [number / middle, _MARGIN * number / largest]


def _times(hypothesis: Hypothesis, live_in: LiveIn, x: Tensor, factor: float) -> Tensor:
    """A live-in made larger; of a decay, the log decay."""
    if live_in is hypothesis.decay and hypothesis.transform is not None:
        log_decay = hypothesis.transform.log_decay(x.double())
        return hypothesis.transform.inverse(log_decay * max(factor, 1.0)).to(x.dtype)
    return x * factor


def _turned(probe: Probe, live_in: LiveIn, x: Tensor) -> Tensor:
    """A live-in with the other sign, as far as its range has it."""
    low, _ = probe.ranges[live_in]
    return -x * min(1.0, 0.9 * abs(low) / float(x.abs().max().clamp_min(1e-30))) if low < 0 else x


def _within(probe: Probe, values: Mapping[LiveIn, Tensor]) -> bool:
    """Whether a draw is one that the code can meet."""
    for live_in, x in values.items():
        low, high = probe.ranges[live_in]
        if x.is_floating_point() and not (low <= float(x.min()) and float(x.max()) <= high):
            return False
    return True
