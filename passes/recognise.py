"""Recognise: finds the mixers that are written out in the graph, by what they compute."""

from __future__ import annotations

import logging

from llcompile.passes import lengths
from llcompile.passes.candidate import GraphCandidate
from llcompile.passes.session import Session
from llcompile.patterns.boundary import Outcome, boundary
from llcompile.patterns.graph.regions import Region
from llcompile.patterns.mixer import MixerShape
from llcompile.patterns.records import Declined, Timing
from llcompile.patterns.structure.find import find
from llcompile.patterns.structure.found import Findings, Found, NearMiss, anchor
from llcompile.patterns.structure.numbers import numbers_read
from llcompile.torch_internals import reach
from llcompile.torch_internals.guards import guard_numbers
from llcompile.torch_internals.places import module_of, place_of, user_line

log = logging.getLogger("llcompile")


def recognise(session: Session) -> int:
    """Adds a candidate for each hand-written mixer, and a record for each near miss; returns how many."""
    before = len(session.candidates)
    for region in session.regions:
        if region.closed:
            continue
        with boundary("a graph") as outcome:
            findings = find(region)
        if outcome.failed:
            session.near_misses.append(_failed(session, region, outcome))
            continue
        session.programs[region] = findings.program
        session.structure_counts.update(findings.counts)
        if findings.counts["proofs"]:
            proofs = Timing("proofs of hand-written code", findings.proving, findings.counts["proofs"], "recognise")
            session.timings.append(proofs)
        log.debug("recognise: %s", ", ".join(f"{rule} {n}" for rule, n in sorted(findings.counts.items())))
        for found in findings.found:
            lengths.hold(found, findings.denominators.get(id(found), []))
            _add_candidate(session, region, found, findings.denominators.get(id(found), []))
        if session.settings.compiles:
            _guard(region, findings)
        if findings.stopped is not None:
            session.stopped.append(user_line(anchor(findings.stopped).meta))
        if findings.one is not None:
            key, name = module_of(findings.one.node.meta)
            session.unseen[session.name(key, name)] = user_line(findings.one.node.meta)
        for missed in findings.near_misses:
            record = _declined(session, missed)
            session.near_misses.append(record)
            nodes = () if missed.subgraph is None else (op.node for op in missed.subgraph.ops)
            session.missed_nodes.setdefault(record, frozenset({*nodes, missed.anchor}))
    return len(session.candidates) - before


def _guard(region: Region, findings: Findings) -> None:
    """What was read off tensors that may change is checked at every call."""
    denominators = (f for group in findings.denominators.values() for f in group)
    for value in numbers_read(findings.program, [*findings.found, *denominators], findings.near_misses):
        assert value.node is not None
        assert value.data is not None
        guard_numbers(region.outer(value.node), value.data)


def _add_candidate(session: Session, region: Region, found: Found, denominators: list[Found]) -> None:
    node = found.anchor
    key, name = place_of(node)
    owner = reach.find_module(key) if key else None
    candidate = GraphCandidate(
        node, region, session.name(key, name), user_line(node.meta), owner, found=found, denominators=denominators
    )
    candidate.cell, candidate.certificate = found.hypothesis.family, found.certificate
    candidate.shape = MixerShape(*found.sizes)
    if found.fixed is not None and not found.held:
        candidate.decline(found.fixed)
    session.candidates.append(candidate)


def _failed(session: Session, region: Region, outcome: Outcome) -> Declined:
    """The record of a graph that could not be looked at."""
    last = next(node for node in reversed(region.graph.nodes) if node.op != "output")
    key, name = module_of(last.meta)
    return Declined.because(outcome.given, session.name(key, name), user_line(last.meta))


def _declined(session: Session, missed: NearMiss) -> Declined:
    key, name = module_of(missed.anchor.meta)
    return Declined.because(missed.rejection.given, session.name(key, name), user_line(missed.anchor.meta))
