"""Both ways: a causal mixer that has a twin for the other direction is no causal mixer, and is left as it is."""

from __future__ import annotations

from itertools import islice

from llcompile.patterns.graph.walk import walk
from llcompile.patterns.reasons import looks_both_ways
from llcompile.patterns.structure.follow import WEIGHTED
from llcompile.patterns.structure.found import Findings, Found, NearMiss
from llcompile.patterns.structure.lifted import origin
from llcompile.patterns.structure.program import Op, Value
from llcompile.torch_internals.places import module_of

_REACH = 40  # operations behind an output among which it may meet its twin


def set_pairs_aside(findings: Findings) -> None:
    """Takes mixers off the found ones where the same module mixes the same, or adds to it, in the other direction."""
    twins = [missed for missed in findings.near_misses if looks_both_ways(missed.rejection.given.code)]
    findings.found = [found for found in findings.found if not any(_are_a_pair(found, twin) for twin in twins)]


def _are_a_pair(found: Found, twin: NearMiss) -> bool:
    if module_of(found.anchor.meta) != module_of(twin.anchor.meta):
        return False
    same = not twin.origins.isdisjoint(map(origin, found.subgraph.live_ins))
    return same or not _behind(found.output).isdisjoint(_behind(twin.value))


def _behind(value: Value) -> set[Op]:
    """What is done to a value up to the next projection."""

    def onward(op: Op) -> list[Op]:
        return [] if op.name in WEIGHTED else [user for made in op.outputs for user in made.users]

    return set(islice(walk(value.users, onward), _REACH))
