"""Search: the mixers of a program with one choice of the time axis."""

from __future__ import annotations

import functools
import itertools
import logging
import operator
from collections.abc import Sequence
from typing import Literal

from torch import fx

from llcompile.patterns import reasons
from llcompile.patterns.known.capture import captured_function
from llcompile.patterns.structure.attempt import Attempts, called_by, made_by
from llcompile.patterns.structure.axis_rules.table import rule_for
from llcompile.patterns.structure.classify import Rejection
from llcompile.patterns.structure.cut import Cutter, Subgraph
from llcompile.patterns.structure.cuts import Cuts
from llcompile.patterns.structure.facts import TimeAnalysis
from llcompile.patterns.structure.found import Findings, Found, NearMiss
from llcompile.patterns.structure.moves import SHAPES
from llcompile.patterns.structure.program import Op, Row, Value
from llcompile.patterns.structure.ranges import ranges
from llcompile.patterns.structure.screen import Screen
from llcompile.patterns.structure.tail import Tail

log = logging.getLogger("llcompile")
_ROW_CUTS = 3  # of a row
_UNLIKE = ("unknown-scores", "near-a-family")  # queries, keys and values are known


class Search:
    """The search with one choice of the time axis.

    Where operands mix positions themselves (keys with the keys before), the values that look like a mixer's output
    are searched again, with such operands as live-ins; `before` are the searches so far, the first one first.

    Args:
        findings: what is found is added here.
        analysis: the facts of the program, which the search computes on its way.
        taken: outputs of mixers that were found before.
        before: the searches so far.
    """

    def __init__(
        self, findings: Findings, analysis: TimeAnalysis, taken: set[Value], before: Sequence[Search] = ()
    ) -> None:
        self.findings, self.analysis, self.taken, self.before = findings, analysis, taken, before
        self.open, self.tried, self.rows = set[Value](), set[Value](), dict[Value, Found]()
        bounds = ranges(findings.program)
        zeros = {v for v, found in bounds.items() if v.op is not None and found == (0.0, 0.0)}
        self.cuts, self.screen = Cuts(Cutter(analysis, zeros), self._kind if before else None), Screen(analysis)
        earlier = [search.attempts for search in before]
        self.attempts: Attempts = Attempts(findings, self.cuts, bounds, self.screen, earlier)
        ops = findings.program.ops
        self.captured = {op.node for op in ops if captured_function(_called(op.node).target) is not None}

    def run(self) -> None:
        """Goes through the program in order."""
        for op in self.findings.program.ops:
            self.analysis.step(op)
            self._expect_rule(op)
            for value in op.outputs:
                if value in self.taken or op.node in self.captured:
                    self.analysis.facts[value].mixed = False
                elif self._is_candidate(op, value):
                    if self.findings.is_spent():
                        self.findings.stopped = self.findings.stopped or value
                        return
                    self._try(value)

    def _expect_rule(self, op: Op) -> None:
        """Notes an operation that takes scores and that no axis can be followed through."""
        if rule_for(op) is not None or op.node in self.captured or not op.outputs:
            return
        if not self.before and any(map(self.screen.stands_across, op.inputs)):
            rejection = Rejection(reasons.UNKNOWN_ON_SCORES(operation=called_by(op)), 1)
            self.findings.near_misses.append(NearMiss(op.outputs[0], rejection, analysis=self.analysis))

    def _is_candidate(self, op: Op, value: Value) -> bool:
        """Whether a value is to be tried: not one that was, or that only views one."""
        if self.before and not any(value in search.open for search in self.before):
            return False
        if not self.screen.may_be_output(op, value):
            return False
        if any(op in found.ops for found in self.findings.found if found.analysis is not self.analysis):
            return False  # it was found before, with time as it was before it was padded
        if op.name in SHAPES and op.inputs and op.inputs[0] in self.tried:
            self.tried.add(value)
            return False
        return self.screen.is_seen(value)

    def _try(self, value: Value) -> None:
        self.tried.add(value)
        best: Rejection | None = None
        subgraph: Subgraph | None = None
        nearest: Subgraph | None = None
        unlike: list[tuple[Subgraph, Tail | None]] = []
        spare: Found | None = None
        for subgraph, tail in self.cuts.of(value):
            if not self.attempts.is_new(subgraph, tail):
                continue
            self.findings.counts["cuts"] += 1
            try:
                found = self.attempts.found(subgraph, tail)
            except Rejection as rejection:
                made = made_by(subgraph.result)
                log.debug("structure: %s %s from %s: %s", made, subgraph.result, subgraph.live_ins, rejection)
                if rejection.open:
                    self.open.add(value)
                if rejection.given.code in _UNLIKE:
                    unlike.append((subgraph, tail))
                if best is None or rejection.near > best.near:
                    best, nearest = rejection, subgraph
                continue
            if found.spreads_rates or self._may_hold_value(found):
                spare = spare or found
                continue
            self._take(value, found)
            return
        if spare is not None:
            self._take(value, spare)
            return
        if self._is_erased(value, unlike):
            return
        if not self.before and best is not None and nearest is not None and best.near > 0:
            why = functools.partial(self.attempts.why, nearest, best)
            self.findings.near_misses.append(NearMiss(value, best, subgraph, why, self.analysis))

    def _kind(self, row: Row) -> Literal["mixer", "sum"] | None:
        """What a row of pieces is, one of several that a value is computed from."""
        for subgraph in itertools.islice(self.cuts.parts(row), _ROW_CUTS):
            self.findings.counts["cuts"] += 1
            try:
                self.rows[row] = found = self.attempts.found(subgraph, None)
            except Rejection as rejection:
                log.debug("structure: row %s from %s: %s", row, subgraph.live_ins, rejection)
                continue
            return "sum" if found.hypothesis.value is None else "mixer"
        return None

    def _may_hold_value(self, found: Found) -> bool:
        """Whether a sum of keys alone may be one of keys and values: each is a product of one tensor with itself."""
        return found.hypothesis.value is None and self.cuts.is_product(found.hypothesis.key, squares=True)

    def _is_erased(self, value: Value, unlike: list[tuple[Subgraph, Tail | None]]) -> bool:
        """Whether it is a mixer that erases along a key of its own: tried last, as beta k beside k is like two keys."""
        for subgraph, tail in unlike:
            try:
                self._take(value, self.attempts.found(subgraph, tail, erased=True))
            except Rejection as rejection:
                log.debug("structure: %s with an erase key: %s", subgraph.result, rejection)
                continue
            return True
        return False

    def _take(self, value: Value, found: Found) -> None:
        found.full = found.hypothesis.value is None and self.cuts.is_scaled(found.hypothesis.key)
        sides = () if found.tail is None else found.tail.sides
        self.findings.found += [*(self.rows[side] for side in sides), found]
        self.taken.add(value)
        self.analysis.facts[value].mixed = False


def _called(node: fx.Node) -> fx.Node:
    """The call that a node takes a result of, or the node."""
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node
