"""Numbers: the tensors of the user's program whose numbers a recognised mixer rests on.

A mask, a decay or a scale that is a buffer was read when the graph was compiled. It may change: by `load_state_dict`,
by an assignment, in place. Whoever compiles has to guard it.
"""

from __future__ import annotations

from collections.abc import Iterable

from llcompile.patterns.graph.walk import walk
from llcompile.patterns.structure.found import Found, NearMiss
from llcompile.patterns.structure.lifted import LiveIn, sample_of
from llcompile.patterns.structure.program import Program, Value
from llcompile.patterns.structure.ranges import REALS, Range, ranges


def numbers_read(program: Program, found: Iterable[Found], missed: Iterable[NearMiss]) -> list[Value]:
    """The values that were read off tensors which may change, and decide what was found or missed."""
    parts = [*(f.ops for f in found), *(m.subgraph.ops for m in missed if m.subgraph is not None)]
    read = {v: None for ops in parts for op in ops for v in op.inputs if v.is_read}
    if any(v.is_read for v in program.inputs):
        known, unknown = ranges(program), ranges(program, numbers=False)
        for live_in in (s for f in found for s in f.hypothesis.operands):
            if known.get(sample_of(live_in), REALS) != unknown.get(sample_of(live_in), REALS):
                read.update(dict.fromkeys(_above(live_in, known)))
    return list(read)


def _above(live_in: LiveIn, known: dict[Value, Range]) -> list[Value]:
    """The values with numbers that bound a live-in."""
    above = lambda v: () if v.op is None else (p for p in v.op.inputs if known[p] != REALS)  # noqa: E731
    return [value for value in walk([sample_of(live_in)], above) if value.is_read]
