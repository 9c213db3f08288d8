"""Find: goes through a graph and tries, at every value that mixes times, whether it is a mixer."""

from __future__ import annotations

import logging
import time as clock
from collections import Counter

import torch
from torch.utils._python_dispatch import _disable_current_modes

from llcompile.patterns import reasons
from llcompile.patterns.graph.regions import Region
from llcompile.patterns.structure.axes import Axis, length
from llcompile.patterns.structure.both_ways import set_pairs_aside
from llcompile.patterns.structure.classify import Rejection
from llcompile.patterns.structure.computed_twice import merge_computed_twice
from llcompile.patterns.structure.denominators import pair_denominators
from llcompile.patterns.structure.facts import TimeAnalysis, born_axes, lengthened, time_axes
from llcompile.patterns.structure.follow import Followed, follow_program
from llcompile.patterns.structure.found import Findings, NearMiss
from llcompile.patterns.structure.name_written import name_written
from llcompile.patterns.structure.near_misses import explain_near_misses
from llcompile.patterns.structure.one_position import one_position
from llcompile.patterns.structure.other_lengths import expect_elsewhere, expect_same
from llcompile.patterns.structure.program import Value
from llcompile.patterns.structure.record import record
from llcompile.patterns.structure.search import Search
from llcompile.torch_internals.sizes import is_symbolic

log = logging.getLogger("llcompile")

_TIMES = 3  # axes that are tried as time
_BORN = 8  # axes that the model makes which are tried as well
# What operands may be, in the searches one after another: each token's own, then what mixes tokens of one sequence.
_OPERANDS: tuple[dict[str, bool], ...] = ({}, {"lone": True}, {"lone": True, "wide": True})


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
    # Not in the user's modes: a default device, say.
    modes = _disable_current_modes(), torch._C.DisableTorchFunction()
    with modes[0], modes[1], torch.no_grad(), torch.autocast("cpu", enabled=False):
        followed = follow_program(program)
        findings = Findings(program, counts=Counter(followed.counts))
        given = time_axes(program, followed)[:_TIMES]
        _search_all(findings, followed, given)
        pair_denominators(findings)
        explain_near_misses(findings, given)
        set_pairs_aside(findings)
    if not findings.found and not findings.near_misses:
        findings.one = one_position(program)
    return findings


def _search_all(findings: Findings, followed: Followed, given: list[Axis]) -> None:
    """Searches with each axis that may be time: those of the input, those that the model makes, then pieces."""
    taken: set[Value] = set()
    for axis in given:
        _search(findings, followed, axis, taken)
        if findings.found:
            break
    born, pieces = born_axes(findings.program, followed, given)
    for axis in born[:_BORN]:
        said = len(findings.near_misses)
        _search(findings, followed, axis, taken)
        # The model makes axes that are no time: pools, experts. Nothing was measured of the farthest misses there.
        findings.near_misses[said:] = [m for m in findings.near_misses[said:] if m.rejection.near > 1]
    if not findings.found and not findings.near_misses:
        _search_pieces(findings, followed, pieces[:_TIMES])


def _search(findings: Findings, followed: Followed, axis: Axis, taken: set[Value]) -> None:
    for time in (axis, *lengthened(followed, axis)):
        searches: list[Search] = []
        for given in _OPERANDS:
            if searches and not any(search.open - taken for search in searches):
                break
            analysis = TimeAnalysis(findings.program, followed, time, shorter=axis, **given)
            searches.append(Search(findings, analysis, taken, tuple(searches)))
            searches[-1].run()


def _search_pieces(findings: Findings, followed: Followed, pieces: list[Axis]) -> None:
    """Where nothing else was found: what is a mixer of a piece of its sequence."""
    for axis in pieces:
        apart = Findings(findings.program)
        _search(apart, followed, axis, set())
        rejection = Rejection(reasons.PIECE_OF_SEQUENCE(tokens=length(axis)), 2)
        mixers = [NearMiss(f.output, rejection, f.subgraph, analysis=f.analysis) for f in apart.found]
        findings.near_misses += mixers + apart.near_misses
