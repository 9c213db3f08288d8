"""Assume: a decay that is a parameter, or a tensor that the call is given. Nothing in the code bounds it.

The rewrite holds while its numbers lie in (0, 1]; the rewritten graph checks that on every call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch._subclasses.fake_tensor import FakeTensor

from llcompile.patterns import reasons
from llcompile.patterns.structure.classify import Rejection
from llcompile.patterns.structure.cut import Subgraph
from llcompile.patterns.structure.facts import TimeAnalysis
from llcompile.patterns.structure.lifted import Lifted, LiveIn, sample_of
from llcompile.patterns.structure.program import Value
from llcompile.patterns.structure.ranges import REALS, Range

DECAYS: Range = (0.0, 1.0)
_LARGEST = 65536  # numbers that a decay has at most: heads times channels


def learned(subgraph: Subgraph, bounds: Mapping[LiveIn, Range], analysis: TimeAnalysis) -> dict[LiveIn, Range]:
    """The subgraph's live-ins that may be such decays, with the range that is assumed."""
    return {
        s: DECAYS
        for s in subgraph.live_ins
        if _is_learned(sample_of(s), analysis) or (isinstance(s, Value) and _is_given(s, analysis))
        if bounds[s] == REALS and math.prod(sample_of(s).shape) <= _LARGEST
    }


def _is_learned(value: Value, analysis: TimeAnalysis) -> bool:
    fact = analysis.facts.get(value)
    return fact is not None and fact.weight and not fact.data


def _is_given(value: Value, analysis: TimeAnalysis) -> bool:
    """Whether the call is given it as it is, for all positions: a number for each head, and channel."""
    fact, long = analysis.facts[value], [size for size in value.shape if size != 1]
    return value.op is None and fact.data and fact.form == "timeless" and len(long) <= 2


def expect_decay(live_in: LiveIn) -> None:
    """Looks at its numbers, where there are any (a model on the meta device has none).

    Raises:
        Rejection: they do not lie in (0, 1].
    """
    value = live_in.base.value if isinstance(live_in, Lifted) and live_in.base is not None else live_in
    held = value.held if isinstance(value, Value) else None
    if held is None or held.is_meta or isinstance(held, FakeTensor) or held.numel() == 0:
        return
    low, high = (float(x) for x in held.detach().aminmax())
    if not 0 < low <= high <= 1:
        raise Rejection(reasons.DECAY_OUT_OF_RANGE(low=low, high=high), 3)
