"""Proof: what a problem is, with its certificate; from memory where the same program was proved before."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from llcompile.patterns import reasons
from llcompile.patterns.boundary import NOT_SHOWN, CannotRun, NotKnown
from llcompile.patterns.records import Certificate
from llcompile.patterns.structure.assume import learned
from llcompile.patterns.structure.certify import certify
from llcompile.patterns.structure.classify import Rejection, classify
from llcompile.patterns.structure.facts import TimeAnalysis
from llcompile.patterns.structure.fit import fit
from llcompile.patterns.structure.found import Findings
from llcompile.patterns.structure.hypothesis import Hypothesis
from llcompile.patterns.structure.lifted import LiveIn
from llcompile.patterns.structure.memo import fingerprint, is_lasting, recall, remember
from llcompile.patterns.structure.observations import Observations
from llcompile.patterns.structure.probe import Probe
from llcompile.patterns.structure.problem import Problem, first_line
from llcompile.patterns.structure.program import Value
from llcompile.patterns.structure.ranges import Range

log = logging.getLogger("llcompile")

_LARGER = 1e6
Proved = tuple[Hypothesis, Certificate]


def proved(
    problem: Problem, analysis: TimeAnalysis, bounds: Mapping[Value, Range], findings: Findings, erased: bool = False
) -> Proved:
    """The mixer that a problem is.

    Args:
        problem: what is to be understood.
        analysis: the facts of the program.
        bounds: the range of every value of the program.
        findings: where proofs are counted, and what did not run is kept for this look.
        erased: whether it is one that erases along a key of its own.

    Raises:
        Rejection: it is none.
    """
    key = fingerprint(problem), erased
    if key in findings.failed:
        raise findings.failed[key]
    known = recall(key, problem)
    if known is None:
        findings.counts["proofs"] += 1
        start = time.perf_counter()
        try:
            known = _prove(problem, analysis, bounds, erased)
        except Rejection as first:
            rejection = first
            if not first.near and problem.meets:
                rejection = Rejection(first.given, 1, first.open)
            if is_lasting(first):
                remember(key, problem, rejection)
            else:
                findings.failed[key] = rejection
            raise rejection from first.__cause__
        finally:
            findings.proving += time.perf_counter() - start
        remember(key, problem, known)
    return known


def _prove(problem: Problem, analysis: TimeAnalysis, bounds: Mapping[Value, Range], erased: bool) -> Proved:
    """The proof; where there is none, with parameters that nothing bounds taken as rates, then as decays."""
    try:
        return _prove_within(problem, problem.ranges, bounds, erased)
    except Rejection:
        assumed = learned(problem.subgraph, problem.ranges, analysis)
        if not assumed:
            raise
    for sign in (-1.0, 1.0) if _grows(problem.probe()) else ():
        with suppress(Rejection):
            return _prove_within(problem, problem.ranges, bounds, erased, dict.fromkeys(assumed, sign))
    hypothesis, certificate = _prove_within(problem, {**problem.ranges, **assumed}, bounds, erased)
    return replace(hypothesis, assumed=hypothesis.decay in assumed), certificate


def _prove_within(
    problem: Problem,
    ranges: Mapping[LiveIn, Range],
    bounds: Mapping[Value, Range],
    erased: bool,
    signs: Mapping[LiveIn, float] | None = None,
) -> Proved:
    """The proof within these ranges; a learned rate of either sign is classified where it lets the past fade."""
    try:
        probe = problem.probe(ranges)
        for live_in, sign in (signs or {}).items():
            probe.values[live_in] = probe.values[live_in].abs() * (4 * sign / probe.length)
        return certify(problem.subgraph, fit(probe, classify(Observations(probe)), erased), probe, bounds)
    except NOT_SHOWN as error:
        log.debug("structure: %s: %s", problem.subgraph.result, first_line(error))
        strange = isinstance(error, NotKnown) and not isinstance(error, CannotRun)
        raise Rejection(reasons.UNKNOWN_AXES() if strange else reasons.NOT_RUN()) from error


def _grows(probe: Probe) -> bool:
    """Whether later outputs are so large that nothing is seen of their own position."""
    first, *_, last = probe.outputs().abs().amax(1).tolist()
    return not last < _LARGER * first
