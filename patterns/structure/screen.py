"""Screen: what can be told without numbers, so that most values cost little: where a mixer may end, and of what."""

from __future__ import annotations

import functools
import itertools
import math

from torch import fx

from llcompile.patterns import reasons
from llcompile.patterns.structure.axes import dims_of
from llcompile.patterns.structure.classify import Rejection
from llcompile.patterns.structure.cut import Subgraph
from llcompile.patterns.structure.cuts import SOURCES
from llcompile.patterns.structure.facts import TimeAnalysis
from llcompile.patterns.structure.found import values_of
from llcompile.patterns.structure.lifted import Lifted
from llcompile.patterns.structure.moves import SHAPES, WRITES
from llcompile.patterns.structure.problem import Problem
from llcompile.patterns.structure.program import Op, Value

_MOST_WEIGHTS = 2**27  # numbers of the model's own, drawn anew for each proof
LARGE = 8000  # operations of a subgraph that is not run again and again
_NEAR_BY = 30  # values above a write among which its base is looked for
_NORMS = ("native_layer_norm", "native_group_norm", "_fused_rms_norm", "rms_norm", "mean", "_softmax")
_SOFTMAXES = ("_softmax", "_safe_softmax", "_log_softmax")


class Screen:
    """Checks of values and subgraphs, by the facts of a program."""

    def __init__(self, analysis: TimeAnalysis) -> None:
        self.analysis = analysis
        self._across: dict[Value, bool] = {}

    def may_be_output(self, op: Op, value: Value) -> bool:
        """Whether an operation's result may be what a mixer ends at."""
        fact = self.analysis.facts[value]
        if not (fact.mixed and fact.data and fact.form == "sequence") or not value.dtype.is_floating_point:
            return False
        if any(user.name in WRITES and user.inputs[0] is value and self._builds(user) for user in value.users):
            return False  # a result that is still being written
        return self._may_complete(op)

    def is_seen(self, value: Value) -> bool:
        """Whether some node of the graph reads it or returns it; what a copy into a tensor returns must be read."""
        node = value.node
        return value in self._reads or (node is not None and (bool(node.users) or not _is_copy(node)))

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
        return frozenset(self.analysis.program.reads.values())

    def stands_across(self, value: Value) -> bool:
        """Whether it has a number for each two positions, from the input."""
        if value not in self._across:
            fact = self.analysis.facts.get(value)
            if fact is None or not fact.data or not value.dtype.is_floating_point:
                return False
            dims = itertools.chain(*self.analysis.axes(value))
            self._across[value] = sum(map(self.analysis.is_time, dims)) > len(self.analysis.leaves)
        return self._across[value]

    def has_scores(self, subgraph: Subgraph) -> bool:
        """Whether there is a number for each two positions, from the input."""
        return any(self.stands_across(v) for op in subgraph.ops for v in op.outputs)

    def expect_sequences(self, subgraph: Subgraph) -> None:
        """Several sequences meet, and nothing is done that no family does.

        Raises:
            Rejection: with what is not so.
        """
        facts = self.analysis.facts
        if self._is_residual(subgraph):
            raise Rejection(reasons.RESIDUAL())
        if len(subgraph.live_ins) > SOURCES and len(subgraph.ops) > LARGE:
            raise Rejection(reasons.TOO_LARGE())
        if sum(isinstance(s, Lifted) or facts[s].data for s in subgraph.live_ins) < 2:
            raise Rejection(reasons.FEW_SEQUENCES())
        own = set(subgraph.ops)
        for op in subgraph.ops:
            if op.name in _SOFTMAXES and self.analysis.mixes_time(op):
                raise Rejection(reasons.SOFTMAX_SCORES(), 1)
            whole = [v for v in op.outputs if not (v.dtype.is_floating_point or v.dtype.is_complex)]
            chosen = any(own.intersection(v.users) for v in whole)
            if chosen and any(v.dtype.is_floating_point and facts[v].data for v in op.inputs):
                raise Rejection(reasons.COMPARES_VALUES(), int(self.has_scores(subgraph)))

    def _is_residual(self, subgraph: Subgraph) -> bool:
        """Whether its last operation does no more than to put an earlier mixer's output and a later one together."""
        last = subgraph.result.op
        if not subgraph.earlier or last is None or self.analysis.followed.mixed.get(last):
            return False
        return sum(self.analysis.facts[v].mixed for v in {*last.inputs} - subgraph.earlier) < 2

    def expect_contraction(self, problem: Problem) -> None:
        """Queries and keys have axes that the output does not have; most values fail here.

        Raises:
            Rejection: they do not.
        """
        kept, held = dims_of(problem.result), map(dims_of, problem.layouts.values())
        if not kept.issuperset(problem.frame.leaves):
            raise Rejection(reasons.NOT_ALL_OF_TIME())
        if sum(any(map(problem.frame.is_time, dims)) and not dims <= kept for dims in held) < 2:
            raise Rejection(reasons.NOT_CONTRACTED(), open=self.has_scores(problem.subgraph))

    def expect_few_weights(self, subgraph: Subgraph) -> None:
        """What is drawn at random in place of weights fits into memory, and takes no minutes.

        Raises:
            Rejection: it does not.
        """
        facts = self.analysis.facts
        own = [v for live_in in subgraph.live_ins for v in values_of(live_in) if facts[v].form == "timeless"]
        count = sum(math.prod(v.shape) for v in own)
        if count > _MOST_WEIGHTS:
            raise Rejection(reasons.WEIGHTS_TOO_LARGE(count=count, most=_MOST_WEIGHTS))


def _is_copy(node: fx.Node) -> bool:
    """Whether it is `copy_`, which exported programs call on a part of a tensor where code assigns to that part."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.split(".")[0] == "copy_"
