"""Assume: a learned decay that the code takes as it is. Nothing there bounds it, but its numbers at this time do.

The rewrite holds while the parameter lies in (0, 1]; the rewritten graph checks that on every call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from llcompile.patterns import reasons
from llcompile.patterns.structure.classify import Miss
from llcompile.patterns.structure.cut import Part
from llcompile.patterns.structure.facts import Times
from llcompile.patterns.structure.lifted import Source
from llcompile.patterns.structure.program import Value
from llcompile.patterns.structure.ranges import REALS, Range

DECAYS: Range = (0.0, 1.0)
_LARGEST = 65536  # numbers that a decay has at most: heads times channels


def learned(part: Part, bounds: Mapping[Source, Range], times: Times) -> dict[Source, Range]:
    """The part's sources that may be such decays, with the range that is assumed."""
    return {
        s: DECAYS
        for s in part.sources
        if isinstance(s, Value) and not times.facts[s].data and times.facts[s].weight
        if bounds[s] == REALS and math.prod(s.shape) <= _LARGEST
    }


def expect_decay(source: Source) -> None:
    """Looks at the parameter's numbers, where there are any (a model on the meta device has none).

    Raises:
        Miss: they do not lie in (0, 1].
    """
    held = source.held if isinstance(source, Value) else None
    if held is None or held.is_meta or held.numel() == 0:
        return
    low, high = (float(x) for x in held.detach().aminmax())
    if not 0 < low <= high <= 1:
        raise Miss(reasons.DECAY_OUT_OF_RANGE(low=low, high=high), 3)
