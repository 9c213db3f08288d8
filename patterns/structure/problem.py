"""Problem: a subgraph with axes of its own and the ranges of what comes in, to be understood as a mixer."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from llcompile.patterns import reasons
from llcompile.patterns.boundary import NOT_SHOWN, CannotRun
from llcompile.patterns.structure.axes import Axes, dims_of, shared
from llcompile.patterns.structure.classify import Rejection
from llcompile.patterns.structure.cut import Cutter, Subgraph
from llcompile.patterns.structure.frame import Frame
from llcompile.patterns.structure.lifted import Lifted, LiveIn
from llcompile.patterns.structure.probe import Probe
from llcompile.patterns.structure.program import Value
from llcompile.patterns.structure.ranges import REALS, Range, hull
from llcompile.patterns.structure.sizing import Sizing, small

log = logging.getLogger("llcompile")


@dataclass(frozen=True, eq=False)
class Problem:
    """A subgraph to be understood.

    Args:
        subgraph: the operations.
        frame: the axes of their values.
        layouts: live-in -> its axes.
        result: the axes of the result.
        ranges: live-in -> the range of its numbers.
    """

    subgraph: Subgraph
    frame: Frame
    layouts: Mapping[LiveIn, Axes]
    result: Axes
    ranges: Mapping[LiveIn, Range]

    @functools.cached_property
    def meets(self) -> bool:
        """Whether two sequences meet along an axis that the result does not have, as queries and keys do."""
        held = map(dims_of, self.layouts.values())
        gone = dims_of(self.result).union(self.frame.leaves)
        return bool(shared([dims - gone for dims in held if any(map(self.frame.is_time, dims))]))

    def probe(self, ranges: Mapping[LiveIn, Range] | None = None, whole: bool = False) -> Probe:
        """The subgraph on a draw: with small sizes, or where it does not run at them, with its own.

        Args:
            ranges: of the draw, where they are other ones.
            whole: time keeps its size.

        Raises:
            Rejection: it does not run.
        """
        failure: Exception | None = None
        for sizing in (small(self.frame, self.subgraph, keep_time=whole), Sizing(self.frame)):
            probe = Probe(self.subgraph, self.layouts, self.result, sizing, ranges or self.ranges)
            try:
                probe.run()
            except NOT_SHOWN as error:
                failure = error
                result = self.subgraph.result
                log.debug("structure: %s does not run at %s: %s", result, sizing.shape(result), first_line(error))
                continue
            return probe
        raise Rejection(reasons.NOT_RUN()) from failure


def posed(subgraph: Subgraph, cutter: Cutter, bounds: Mapping[Value, Range]) -> Problem:
    """The problem of a subgraph, from the ranges of all values of the program."""
    frame, layouts = cutter.frame(subgraph)
    ranges = {live_in: _range(subgraph, live_in, bounds) for live_in in subgraph.live_ins}
    return Problem(subgraph, frame, layouts, frame.axes(subgraph.result), ranges)


def _range(subgraph: Subgraph, live_in: LiveIn, bounds: Mapping[Value, Range]) -> Range:
    """Of a row of pieces, what all of them keep to: each may have numbers of its own."""
    values = subgraph.taps[live_in] if isinstance(live_in, Lifted) else [live_in]
    return hull(bounds.get(value, REALS) for value in values)


def first_line(error: BaseException | None) -> str:
    """The first line of an error, of the program's own where it does not run."""
    error = error.__cause__ if isinstance(error, CannotRun) else error
    return f"{type(error).__name__}: {error}".split("\n")[0]
