"""Candidates: which values of a program may be the output of a mixer."""

from __future__ import annotations

import functools

from llcompile.patterns.structure.facts import TimeAnalysis
from llcompile.patterns.structure.lifted import SHAPES
from llcompile.patterns.structure.program import Op, Value

_NORMS = ("native_layer_norm", "native_group_norm", "_fused_rms_norm", "rms_norm", "mean", "_softmax")
_SCATTERS = ("select_scatter", "slice_scatter", "index_put")
_NEAR_BY = 30  # values above a write among which its base is looked for


class Candidates:
    """The candidates of a program, for one choice of time."""

    def __init__(self, analysis: TimeAnalysis) -> None:
        self.analysis, self.program = analysis, analysis.program

    def may_be_output(self, op: Op, value: Value) -> bool:
        """Whether an operation's result may be what a mixer ends at."""
        fact = self.analysis.facts[value]
        if not (fact.mixed and fact.data and fact.form == "sequence") or not value.dtype.is_floating_point:
            return False
        if any(user.name in _SCATTERS and user.inputs[0] is value and self._builds(user) for user in value.users):
            return False  # a result that is still being written
        return self._may_complete(op)

    def is_seen(self, value: Value) -> bool:
        """Whether some node of the graph returns or reads it."""
        return value.node is not None or value in self._reads

    def _builds(self, write: Op) -> bool:
        """Whether a write adds to a result: tokens, or what comes from elsewhere. Others change what is there."""
        base, *pieces = write.inputs
        if self.analysis.mixes_time(write):
            return True
        pending, seen = pieces, set(pieces)
        while pending and len(seen) < _NEAR_BY:
            above = [] if (op := pending.pop().op) is None else [v for v in op.inputs if v not in seen]
            seen.update(above)
            pending.extend(above)
        return bool(pieces) and base not in seen

    def _may_complete(self, op: Op) -> bool:
        """Whether a mixer can end here: something is summed or put together, or two mixed values meet."""
        if op.name in SHAPES:
            return True
        if op.name in _NORMS:
            return False
        return bool(self.analysis.followed.mixed[op]) or sum(self.analysis.facts[v].mixed for v in op.inputs) > 1

    @functools.cached_property
    def _reads(self) -> frozenset[Value]:
        return frozenset(self.program.reads.values())
