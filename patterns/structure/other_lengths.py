"""Other lengths: what was found in a graph for many lengths must be there at others, or its length is fixed."""

from __future__ import annotations

import math
from collections.abc import Callable

from llcompile.patterns import reasons
from llcompile.patterns.graph.regions import Region
from llcompile.patterns.structure.axes import length
from llcompile.patterns.structure.barriers import around
from llcompile.patterns.structure.found import Findings, Found
from llcompile.patterns.structure.positions import Positions, numbers_vary
from llcompile.patterns.structure.program import Program, Value
from llcompile.torch_internals.places import user_line

_COMPARISONS = frozenset(
    ["lt", "le", "gt", "ge", "eq", "ne", "sub", "add", "clamp", "clamp_max", "clamp_min", "tril", "triu"]
)
_LONGEST = 4096  # a window wider than this is not looked for


def expect_same(findings: Findings) -> None:
    """What is computed from positions and sizes must go on as it began, or the length is fixed."""
    for found in (*findings.found, *(f for group in findings.denominators.values() for f in group)):
        redone = filter(numbers_vary, around(found.subgraph, found.tail))
        op = Positions(found).varying() or next(redone, None)
        if op is not None:
            found.fixed = reasons.OTHER_LENGTHS(operation=op.name, where=user_line(op.node.meta))


def expect_elsewhere(region: Region, findings: Findings, find: Callable[[Region, int], Findings]) -> None:
    """A graph for many lengths is one program for each: what is no mixer at another length has its length fixed.

    The other length is beyond any number that the code compares with (the width of a window, say).
    """
    longest = max(length(found.analysis.leaves) for found in findings.found)
    factor = 2 + max((int(n) for n in _compared(findings.program) if n < _LONGEST), default=0) // longest
    seen = {_signature(f) for f in find(region, factor).found}
    for found in [f for f in findings.found if _signature(f) not in seen and not f.fixed]:
        found.fixed = reasons.ONE_LENGTH(length=longest, other=factor * longest)


def _compared(program: Program) -> list[float]:
    """Numbers that the code compares positions with."""
    ops = [op for op in program.ops if op.name in _COMPARISONS]
    return [abs(a) for op in ops for a in op.args if isinstance(a, (int, float)) and math.isfinite(a)]


def _signature(found: Found) -> tuple[object, ...]:
    """What is the same for one mixer at all lengths."""
    return (
        found.anchor,
        found.hypothesis.family,
        tuple(s.node for s in found.hypothesis.operands if isinstance(s, Value)),
    )
