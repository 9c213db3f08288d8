"""Find: goes through a graph and tries, at every value that mixes times, whether it is a mixer."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import operator
import time as clock
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from llcompile.patterns import reasons
from llcompile.patterns.boundary import NOT_SHOWN, CannotRun, boundary
from llcompile.patterns.graph.regions import Region
from llcompile.patterns.known.capture import captured_function
from llcompile.patterns.records import Certificate
from llcompile.patterns.structure.assume import expect_decay, learned
from llcompile.patterns.structure.axes import Axes, Axis, dims_of
from llcompile.patterns.structure.axis_rules.table import rule_for
from llcompile.patterns.structure.barriers import expect_no_barrier
from llcompile.patterns.structure.certify import certify
from llcompile.patterns.structure.classify import Rejection, classify, sees_itself
from llcompile.patterns.structure.computed_twice import merge_computed_twice
from llcompile.patterns.structure.cut import Cutter, Subgraph
from llcompile.patterns.structure.cuts import SOURCES, Cuts
from llcompile.patterns.structure.denominators import pair_denominators
from llcompile.patterns.structure.facts import TimeAnalysis, born_axes, lengthened, time_axes
from llcompile.patterns.structure.fit import fit
from llcompile.patterns.structure.follow import Followed, follow_program
from llcompile.patterns.structure.found import Findings, Found, NearMiss
from llcompile.patterns.structure.frame import Frame
from llcompile.patterns.structure.hypothesis import Hypothesis
from llcompile.patterns.structure.lifted import SHAPES, Lifted, LiveIn, sample_of
from llcompile.patterns.structure.memo import fingerprint, is_lasting, recall, remember
from llcompile.patterns.structure.name_written import name_written
from llcompile.patterns.structure.near_misses import explain_near_misses
from llcompile.patterns.structure.observations import Observations, meet
from llcompile.patterns.structure.one_position import one_position
from llcompile.patterns.structure.other_lengths import expect_elsewhere, expect_same
from llcompile.patterns.structure.positions import Positions
from llcompile.patterns.structure.probe import Probe
from llcompile.patterns.structure.program import Op, Value
from llcompile.patterns.structure.properties import explain
from llcompile.patterns.structure.ranges import REALS, Range, ranges
from llcompile.patterns.structure.record import record
from llcompile.patterns.structure.sizing import Sizing, small
from llcompile.patterns.structure.tail import Tail
from llcompile.torch_internals.places import user_line
from llcompile.torch_internals.sizes import is_symbolic

log = logging.getLogger("llcompile")

_NORMS = ("native_layer_norm", "native_group_norm", "_fused_rms_norm", "rms_norm", "mean", "_softmax")
_SOFTMAXES = ("_softmax", "_safe_softmax", "_log_softmax")
_SCATTERS = ("select_scatter", "slice_scatter", "index_put")
_ASKED = 8000  # operations of a part that is run again and again to say why it is no mixer
_TIMES = 3  # axes that are tried as time
_BORN = 8  # axes that the model makes which are tried as well
_NEAR_BY = 30  # values above a write among which its base is looked for
_LARGER = 1e6


def find(region: Region) -> Findings:
    """All hand-written mixers of a region."""
    start = clock.perf_counter()
    findings = _find(region, 1)
    if findings.found and is_symbolic(region.graph):
        expect_same(findings)
        expect_elsewhere(region, findings, _find)
    log.debug("structure: %d operations, %.0f ms", len(findings.program.ops), 1e3 * (clock.perf_counter() - start))
    return findings


def _find(region: Region, factor: int) -> Findings:
    program = record(region, factor)
    name_written(region, program)
    merge_computed_twice(program)
    taken: set[Value] = set()
    # Not in the user's modes: a default device, say.
    modes = _disable_current_modes(), torch._C.DisableTorchFunction()
    with modes[0], modes[1], torch.no_grad(), torch.autocast("cpu", enabled=False):
        followed = follow_program(program)
        findings = Findings(program, counts=Counter(followed.counts))
        given = time_axes(program, followed)[:_TIMES]
        for axis in given:
            _search(findings, followed, axis, taken)
            if findings.found:
                break
        born, pieces = born_axes(program, followed, given)
        for axis in born[:_BORN]:
            said = len(findings.near_misses)
            _search(findings, followed, axis, taken)
            # The model makes axes that are no time: pools, experts. Nothing was measured of the farthest misses there.
            findings.near_misses[said:] = [m for m in findings.near_misses[said:] if m.rejection.near > 1]
        if not findings.found and not findings.near_misses:
            _search_pieces(findings, followed, pieces[:_TIMES])
        pair_denominators(findings)
        explain_near_misses(findings, given)
    if not findings.found and not findings.near_misses:
        findings.one = one_position(program)
    return findings


def _search(findings: Findings, followed: Followed, axis: Axis, taken: set[Value]) -> None:
    for time in (axis, *lengthened(followed, axis)):
        first = _Search(findings, followed, TimeAnalysis(findings.program, followed, time, shorter=axis), taken)
        first.run()
        if first.open:
            again = TimeAnalysis(findings.program, followed, time, shorter=axis, lone=True)
            _Search(findings, followed, again, taken, first).run()


def _search_pieces(findings: Findings, followed: Followed, pieces: list[Axis]) -> None:
    """Where nothing else was found: what is a mixer of a piece of its sequence."""
    for axis in pieces:
        apart = Findings(findings.program)
        _search(apart, followed, axis, set())
        tokens = math.prod(leaf.size for leaf in axis)
        rejection = Rejection(reasons.PIECE_OF_SEQUENCE(tokens=tokens), 2)
        findings.near_misses += [
            NearMiss(f.output, rejection, f.subgraph, analysis=f.analysis) for f in apart.found
        ] + apart.near_misses


def _called(node: fx.Node) -> fx.Node:
    """The call that a node takes a result of, or the node."""
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


class _Search:
    """The search with one choice of the time axis.

    Where operands mix positions themselves (keys with the keys before), the values that look like a mixer's output
    are searched once more, with such operands as live-ins; `before` is the first search.
    """

    def __init__(
        self,
        findings: Findings,
        followed: Followed,
        analysis: TimeAnalysis,
        taken: set[Value],
        before: _Search | None = None,
    ) -> None:
        self.findings, self.followed, self.analysis, self.taken = findings, followed, analysis, taken
        self.before, self.open = before, set[Value]()
        self.ranges = ranges(findings.program)
        zeros = {v for v, bounds in self.ranges.items() if v.op is not None and bounds == (0.0, 0.0)}
        self.cutter = Cutter(analysis, zeros)
        self.cuts = Cuts(self.cutter)
        self.tried: set[Value] = set()
        self._across: dict[Value, bool] = {}
        self.captured = {
            op.node for op in findings.program.ops if captured_function(_called(op.node).target) is not None
        }

    def run(self) -> None:
        """Goes through the program in order."""
        for op in self.findings.program.ops:
            self.analysis.step(op)
            self._expect_rule(op)
            for value in op.outputs:
                if value in self.taken or op.node in self.captured:
                    self.analysis.facts[value].mixed = False
                elif self._is_candidate(op, value):
                    self._try(value)

    def _expect_rule(self, op: Op) -> None:
        """Notes an operation that takes scores and that no axis can be followed through."""
        if rule_for(op) is not None or op.node in self.captured or not op.outputs:
            return
        if self.before is None and any(self._stands_across(v) for v in op.inputs):
            rejection = Rejection(reasons.UNKNOWN_ON_SCORES(operation=_named(op)), 1)
            self.findings.near_misses.append(NearMiss(op.outputs[0], rejection, analysis=self.analysis))

    def _is_candidate(self, op: Op, value: Value) -> bool:
        fact = self.analysis.facts[value]
        if not (fact.mixed and fact.data and fact.form == "sequence") or not value.dtype.is_floating_point:
            return False
        if any(op in found.ops for found in self.findings.found if found.analysis is not self.analysis):
            return False  # it was found before, with time as it was before it was padded
        if self.before is not None and value not in self.before.open:
            return False
        if any(user.name in _SCATTERS and user.inputs[0] is value and self._builds(user) for user in value.users):
            return False  # a result that is still being written
        if not self._may_complete(op):
            return False
        if op.name in SHAPES and op.inputs and op.inputs[0] in self.tried:
            self.tried.add(value)
            return False
        return value.node is not None or self._is_read(value)

    def _builds(self, write: Op) -> bool:
        """Whether a write adds to a result: tokens, or what comes from elsewhere. Others change what is there."""
        base, *pieces = write.inputs
        pending, seen = pieces, set(pieces)
        while pending and len(seen) < _NEAR_BY:
            above = [] if (op := pending.pop().op) is None else [v for v in op.inputs if v not in seen]
            seen.update(above)
            pending.extend(above)
        return self.analysis.mixes_time(write) or (bool(pieces) and base not in seen)

    def _may_complete(self, op: Op) -> bool:
        """Whether a mixer can end here: something is summed or put together, or two mixed values meet."""
        if op.name in SHAPES:
            return True
        if op.name in _NORMS:
            return False
        return bool(self.followed.mixed[op]) or sum(self.analysis.facts[v].mixed for v in op.inputs) > 1

    def _is_read(self, value: Value) -> bool:
        if not hasattr(self, "_reads"):
            self._reads = set(self.findings.program.reads.values())
        return value in self._reads

    def _try(self, value: Value) -> None:
        self.tried.add(value)
        best: Rejection | None = None
        subgraph: Subgraph | None = None
        nearest: Subgraph | None = None
        for subgraph, tail in self.cuts.of(value):
            if self.before is not None and not self._is_new(subgraph):
                continue
            self.findings.counts["cuts"] += 1
            try:
                found = self._read_safely(subgraph, tail)
            except Rejection as rejection:
                log.debug(
                    "structure: %s %s from %s: %s",
                    _made_by(subgraph.result),
                    subgraph.result,
                    subgraph.live_ins,
                    rejection,
                )
                if rejection.open:
                    self.open.add(value)
                if best is None or rejection.near > best.near:
                    best, nearest = rejection, subgraph
                continue
            self.findings.found.append(found)
            self.taken.add(value)
            self.analysis.facts[value].mixed = False
            return
        if self.before is None and best is not None and nearest is not None and best.near > 0:
            why = functools.partial(self._why, nearest, best)
            self.findings.near_misses.append(NearMiss(value, best, subgraph, why, self.analysis))

    def _is_new(self, subgraph: Subgraph) -> bool:
        """Whether it has a live-in that the first search took for mixed."""
        assert self.before is not None
        return any(self.before.mixes(s) for s in subgraph.live_ins)

    def _why(self, subgraph: Subgraph, rejection: Rejection) -> Rejection:
        """The miss with the first property that fails, if one can be measured."""
        if len(subgraph.ops) > _ASKED or subgraph.random is not None:
            return rejection
        frame, axes = self.cutter.frame(subgraph)
        result = frame.axes(subgraph.result)
        bounds = {s: self._range(subgraph, s) for s in subgraph.live_ins}
        key = "why", fingerprint(subgraph, axes, result, bounds)
        try:
            recall(key, subgraph, axes, result)
        except Rejection as known:
            return known
        # What holds for few tokens may fail for many.
        for whole in (False, True)[: 1 + (rejection.near > 2)]:
            try:
                probe = self._probe(frame, subgraph, axes, result, bounds, whole)
                origins = {s: above for s, (above, _) in self.cuts.origins(subgraph).items()}
                rejection, done = explain(Observations(probe, origins), rejection)
            except (Rejection, *NOT_SHOWN):
                break
            if done:
                break
        remember(key, subgraph, axes, result, rejection)
        return rejection

    def _read_safely(self, subgraph: Subgraph, tail: Tail | None) -> Found:
        """As `_read`; an exception of the recogniser's own is a miss of this part."""
        missed: Rejection | None = None
        with boundary(f"{_made_by(subgraph.result)} {subgraph.result}") as outcome:
            try:
                return self._read(subgraph, tail)
            except Rejection as rejection:
                missed = rejection
        raise missed or Rejection(outcome.given, 1)

    def _read(self, subgraph: Subgraph, tail: Tail | None) -> Found:
        self._expect_sequences(subgraph)
        frame, axes = self.cutter.frame(subgraph)
        result = frame.axes(subgraph.result)
        self._expect_contraction(subgraph, frame, axes, result)
        meets = int(meet(axes, result, frame))
        drawn = subgraph.random
        if drawn is not None:
            random = reasons.RANDOM(operation=_named(drawn), where=user_line(drawn.node.meta))
            raise Rejection(random, 3 * meets, open=meets > 0)
        if len(subgraph.live_ins) > SOURCES:
            raise Rejection(reasons.TOO_MANY_OPERANDS(most=SOURCES, count=len(subgraph.live_ins)), meets)
        bounds = {s: self._range(subgraph, s) for s in subgraph.live_ins}
        key = fingerprint(subgraph, axes, result, bounds)
        if key in self.findings.failed:
            raise self.findings.failed[key]
        known = recall(key, subgraph, axes, result)
        if known is None:
            self.findings.counts["proofs"] += 1
            try:
                known = self._prove(frame, subgraph, axes, result, bounds)
            except Rejection as first:
                rejection, lasting = first, is_lasting(first)
                if not rejection.near and meet(axes, result, frame):
                    rejection = Rejection(rejection.given, 1, rejection.open)
                if lasting:
                    remember(key, subgraph, axes, result, rejection)
                else:
                    self.findings.failed[key] = rejection
                raise rejection from first.__cause__
            remember(key, subgraph, axes, result, known)
        if self.before is not None:
            self.before.expect_causal(known[0])
        if known[0].assumed and known[0].decay is not None:
            expect_decay(known[0].decay)
        expect_no_barrier(subgraph, tail, self.analysis, self.findings.program)
        mixer = Found(subgraph, *known, frame, self.analysis, self.findings.program, tail)
        self._expect_seen(mixer)
        return mixer

    def _expect_seen(self, found: Found) -> None:
        """What has not happened at any position so far would happen at some position further on."""
        op = Positions(found).unseen()
        if op is not None:
            where = user_line(op.node.meta)
            raise Rejection(reasons.SHORT_EXAMPLE(operation=op.name, where=where, length=self.cutter.length), 3)

    def _prove(
        self,
        frame: Frame,
        subgraph: Subgraph,
        axes: Mapping[LiveIn, Axes],
        result: Axes,
        bounds: Mapping[LiveIn, Range],
    ) -> tuple[Hypothesis, Certificate]:
        try:
            return self._prove_within(frame, subgraph, axes, result, bounds)
        except Rejection:
            assumed = learned(subgraph, bounds, self.analysis)
            if not assumed:
                raise
        for sign in (-1.0, 1.0) if _grows(self._probe(frame, subgraph, axes, result, bounds)) else ():
            with suppress(Rejection):
                return self._prove_within(frame, subgraph, axes, result, bounds, dict.fromkeys(assumed, sign))
        hypothesis, certificate = self._prove_within(frame, subgraph, axes, result, {**bounds, **assumed})
        return replace(hypothesis, assumed=hypothesis.decay in assumed), certificate

    def _prove_within(
        self,
        frame: Frame,
        subgraph: Subgraph,
        axes: Mapping[LiveIn, Axes],
        result: Axes,
        bounds: Mapping[LiveIn, Range],
        signs: Mapping[LiveIn, float] | None = None,
    ) -> tuple[Hypothesis, Certificate]:
        """The proof within these ranges; a learned rate of either sign is classified where it lets the past fade."""
        try:
            probe = self._probe(frame, subgraph, axes, result, bounds)
            for live_in, sign in (signs or {}).items():
                probe.values[live_in] = probe.values[live_in].abs() * (4 * sign / probe.length)
            return certify(subgraph, fit(probe, classify(Observations(probe))), probe, self.ranges)
        except NOT_SHOWN as error:
            raise Rejection(reasons.NOT_RUN(error=_line(error))) from error

    def mixes(self, live_in: LiveIn) -> bool:
        """Whether a live-in joins positions; a row of pieces that a tail put together does."""
        fact = self.analysis.facts.get(sample_of(live_in))
        return fact is None or fact.mixed

    def expect_causal(self, hypothesis: Hypothesis) -> None:
        """The operands that mix positions look back and at the token itself: what is read may see no more than before.

        Raises:
            Rejection: one does not, or it could not be seen.
        """
        late = {live_in for live_in in filter(self.mixes, hypothesis.layouts) if not self._sees_itself(live_in)}
        if hypothesis.key in late and (hypothesis.value is None or hypothesis.value in late):
            raise Rejection(reasons.STRICTLY_CAUSAL(), 3)

    def _sees_itself(self, live_in: LiveIn) -> bool:
        value = sample_of(live_in)
        subgraph = self.cutter.cut(value)
        if subgraph is None:
            raise Rejection(reasons.OPERAND_TOO_LARGE())
        frame, axes = self.cutter.frame(subgraph)
        result = frame.axes(value)
        try:
            bounds = {s: self._range(subgraph, s) for s in subgraph.live_ins}
            return sees_itself(Observations(self._probe(frame, subgraph, axes, result, bounds)))
        except NOT_SHOWN as error:
            raise Rejection(reasons.OPERAND_NOT_RUN(error=_line(error))) from error

    def _expect_sequences(self, subgraph: Subgraph) -> None:
        """What can be told without numbers, so that most values cost little."""
        facts = self.analysis.facts
        if self._is_residual(subgraph):
            raise Rejection(reasons.RESIDUAL())
        if len(subgraph.live_ins) > SOURCES and len(subgraph.ops) > _ASKED:
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
                raise Rejection(reasons.COMPARES_VALUES(), int(self._has_scores(subgraph)))

    def _is_residual(self, subgraph: Subgraph) -> bool:
        """Whether its last operation does no more than to put an earlier mixer's output and a later one together."""
        last = subgraph.result.op
        if not subgraph.earlier or last is None or self.followed.mixed.get(last):
            return False
        return sum(self.analysis.facts[v].mixed for v in {*last.inputs} - subgraph.earlier) < 2

    def _has_scores(self, subgraph: Subgraph) -> bool:
        """Whether there is a number for each two positions, from the input."""
        return any(self._stands_across(v) for op in subgraph.ops for v in op.outputs)

    def _stands_across(self, value: Value) -> bool:
        """Whether it has a number for each two positions, from the input."""
        if value not in self._across:
            fact = self.analysis.facts.get(value)
            if fact is None or not fact.data or not value.dtype.is_floating_point:
                return False
            dims = itertools.chain(*self.analysis.axes(value))
            self._across[value] = sum(map(self.analysis.is_time, dims)) > len(self.analysis.leaves)
        return self._across[value]

    def _expect_contraction(self, subgraph: Subgraph, frame: Frame, axes: Mapping[LiveIn, Axes], result: Axes) -> None:
        """Queries and keys have axes that the output does not have; told without numbers, as most values fail here."""
        kept, held = dims_of(result), map(dims_of, axes.values())
        if not kept.issuperset(frame.leaves):
            raise Rejection(reasons.NOT_ALL_OF_TIME())
        if sum(any(map(frame.is_time, dims)) and not dims <= kept for dims in held) < 2:
            raise Rejection(reasons.NOT_CONTRACTED(), open=self._has_scores(subgraph))

    def _probe(
        self,
        frame: Frame,
        subgraph: Subgraph,
        axes: Mapping[LiveIn, Axes],
        result: Axes,
        bounds: Mapping[LiveIn, Range],
        whole: bool = False,
    ) -> Probe:
        failure: Exception | None = None
        for sizing in (small(frame, subgraph, keep_time=whole), Sizing(frame)):
            probe = Probe(subgraph, axes, result, sizing, bounds)
            try:
                probe.run()
            except NOT_SHOWN as error:
                failure = error
                log.debug("structure: %s does not run at %s: %s", subgraph.result, sizing.shape(subgraph.result), error)
                continue
            return probe
        raise Rejection(reasons.NOT_RUN(error=_line(failure))) from failure

    def _range(self, subgraph: Subgraph, live_in: LiveIn) -> Range:
        """Of a row of pieces, what all of them keep to: each may have numbers of its own."""
        values = subgraph.taps[live_in] if isinstance(live_in, Lifted) else [live_in]
        found = [self.ranges.get(value, REALS) for value in values]
        return min(low for low, _ in found), max(high for _, high in found)


def _grows(probe: Probe) -> bool:
    """Whether later outputs are so large that nothing is seen of their own position."""
    first, *_, last = probe.by_time(probe.run()).abs().amax(1).tolist()
    return not last < _LARGER * first


def _line(error: BaseException | None) -> str:
    """The first line of an error."""
    error = error.__cause__ if isinstance(error, CannotRun) else error
    return f"{type(error).__name__}: {error}".split("\n")[0]


def _named(op: Op) -> str:
    """What the user's code calls."""
    called = op.node.target
    return str(getattr(called, "overloadpacket", getattr(called, "__name__", called)))


def _made_by(value: Value) -> str:
    return value.op.name if value.op is not None else "input"
