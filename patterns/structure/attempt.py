"""Attempt: one subgraph tried as a mixer, and why it is none."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from llcompile.patterns import reasons
from llcompile.patterns.boundary import NOT_SHOWN, boundary
from llcompile.patterns.graph.walk import walk
from llcompile.patterns.structure.assume import expect_decay
from llcompile.patterns.structure.barriers import expect_no_barrier
from llcompile.patterns.structure.classify import Rejection, sees_itself
from llcompile.patterns.structure.cut import Subgraph
from llcompile.patterns.structure.cuts import SOURCES, Cuts
from llcompile.patterns.structure.found import Findings, Found, values_of
from llcompile.patterns.structure.hypothesis import Hypothesis
from llcompile.patterns.structure.lifted import LiveIn, is_of_rows, sample_of
from llcompile.patterns.structure.memo import fingerprint, recall, remember
from llcompile.patterns.structure.observations import Observations
from llcompile.patterns.structure.positions import Positions
from llcompile.patterns.structure.problem import Problem, first_line, posed
from llcompile.patterns.structure.program import Op, Row, Value
from llcompile.patterns.structure.proof import proved
from llcompile.patterns.structure.properties import explain
from llcompile.patterns.structure.ranges import Range
from llcompile.patterns.structure.screen import LARGE, Screen
from llcompile.patterns.structure.tail import Tail
from llcompile.torch_internals.places import user_line

log = logging.getLogger("llcompile")


class Attempts:
    """Attempts on the subgraphs of one program, for one choice of time.

    Args:
        findings: what is found.
        cuts: where the subgraphs come from.
        bounds: the range of every value of the program.
        screen: the checks without numbers.
        before: the attempts of the searches so far (see `Search`).
    """

    def __init__(
        self,
        findings: Findings,
        cuts: Cuts,
        bounds: Mapping[Value, Range],
        screen: Screen,
        before: Sequence[Attempts] = (),
    ) -> None:
        self.findings, self.cuts, self.bounds, self.screen, self.before = findings, cuts, bounds, screen, before
        self.analysis, self.cutter = cuts.analysis, cuts.cutter

    def found(self, subgraph: Subgraph, tail: Tail | None, erased: bool = False) -> Found:
        """The mixer that a subgraph is; `erased`: one that erases along a key of its own.

        Raises:
            Rejection: it is none, or the recogniser itself fails.
        """
        with boundary(f"{made_by(subgraph.result)} {subgraph.result}", Rejection) as outcome:
            return self._found(subgraph, tail, erased)
        raise outcome.error if isinstance(outcome.error, Rejection) else Rejection(outcome.given, 1)

    def _found(self, subgraph: Subgraph, tail: Tail | None, erased: bool) -> Found:
        self.screen.expect_sequences(subgraph)
        self.screen.expect_few_weights(subgraph)
        problem = self._posed(subgraph)
        self.screen.expect_contraction(problem)
        drawn = subgraph.random
        if drawn is not None:
            random = reasons.RANDOM(operation=called_by(drawn), where=user_line(drawn.node.meta))
            raise Rejection(random, 3 * problem.meets, open=problem.meets)
        if len(subgraph.live_ins) > SOURCES:
            many = reasons.TOO_MANY_OPERANDS(most=SOURCES, count=len(subgraph.live_ins))
            raise Rejection(many, int(problem.meets))
        hypothesis, certificate = proved(problem, self.analysis, self.bounds, self.findings, erased)
        if self.before:
            self.before[0].expect_causal(hypothesis)
        if hypothesis.assumed and hypothesis.decay is not None:
            expect_decay(hypothesis.decay)
        divides = hypothesis.value is None
        expect_no_barrier(subgraph, tail, self.analysis, self.findings.program, divides)
        mixer = Found(subgraph, hypothesis, certificate, problem.frame, self.analysis, self.findings.program, tail)
        _expect_seen(mixer, self.cutter.length)
        return mixer

    def _posed(self, subgraph: Subgraph) -> Problem:
        return posed(subgraph, self.cutter, self.bounds)

    def why(self, subgraph: Subgraph, rejection: Rejection) -> Rejection:
        """The rejection with the first property that fails, if one can be measured."""
        if len(subgraph.ops) > LARGE or subgraph.random is not None:
            return rejection
        problem = self._posed(subgraph)
        key = "why", fingerprint(problem)
        try:
            recall(key, problem)
        except Rejection as known:
            return known
        # What holds for few tokens may fail for many.
        for whole in (False, True)[: 1 + (rejection.near > 2)]:
            try:
                origins = {s: above for s, (above, _) in self.cuts.origins(subgraph).items()}
                rejection, done = explain(Observations(problem.probe(whole=whole), origins), rejection)
            except (Rejection, *NOT_SHOWN):
                break
            if done:
                break
        remember(key, problem, rejection)
        return rejection

    # -- operands that mix positions themselves

    def is_new(self, subgraph: Subgraph, tail: Tail | None) -> bool:
        """Whether it has a live-in that no search so far could have: the last one took it for mixed, say."""
        if not self.before or (tail is not None and tail.is_wide):
            return True
        last = self.before[-1]
        return any(last.mixes(s) or self._is_row_factor(s) > last._is_row_factor(s) for s in subgraph.live_ins)

    def _is_row_factor(self, live_in: LiveIn) -> bool:
        return isinstance(live_in, Value) and self.analysis.is_row_factor(live_in)

    def mixes(self, live_in: LiveIn) -> bool:
        """Whether a live-in joins positions; a row of pieces that a tail put together does."""
        fact = self.analysis.facts.get(sample_of(live_in))
        return fact is None or fact.mixed

    def expect_causal(self, hypothesis: Hypothesis) -> None:
        """The operands that mix positions look back and at the token itself: what is read may see no more than before.

        Raises:
            Rejection: one does not, or it could not be seen.
        """
        late = {s for s in hypothesis.layouts if not all(map(self._sees_itself, filter(self.mixes, self._read_by(s))))}
        if hypothesis.key in late and (hypothesis.value is None or hypothesis.value in late):
            raise Rejection(reasons.STRICTLY_CAUSAL(), 3)

    def _read_by(self, live_in: LiveIn) -> list[LiveIn]:
        """The live-in; of a row of what a loop carries, the sequences that it is made from, token by token."""
        if not is_of_rows(live_in):
            return [live_in]
        is_whole = lambda v: self.analysis.facts[v].form == "sequence"  # noqa: E731
        onward = lambda v: () if v.op is None or (not isinstance(v, Row) and is_whole(v)) else v.op.inputs  # noqa: E731
        return [v for v in walk(values_of(live_in), onward) if not isinstance(v, Row) and is_whole(v)]

    def _sees_itself(self, live_in: LiveIn) -> bool:
        subgraph = self.cutter.cut(sample_of(live_in))
        if subgraph is None:
            raise Rejection(reasons.OPERAND_TOO_LARGE())
        try:
            return sees_itself(Observations(self._posed(subgraph).probe()))
        except NOT_SHOWN as error:
            log.debug("structure: %s: %s", sample_of(live_in), first_line(error))
            raise Rejection(reasons.OPERAND_NOT_RUN()) from error


def _expect_seen(found: Found, length: int) -> None:
    """What has not happened at any position so far would happen at some position further on."""
    op = Positions(found).unseen()
    if op is not None:
        where = user_line(op.node.meta)
        raise Rejection(reasons.SHORT_EXAMPLE(operation=op.name, where=where, length=length), 3)


def called_by(op: Op) -> str:
    """What the user's code calls."""
    called = op.node.target
    return str(getattr(called, "overloadpacket", getattr(called, "__name__", called)))


def made_by(value: Value) -> str:
    """The operation that makes a value."""
    return value.op.name if value.op is not None else "input"
