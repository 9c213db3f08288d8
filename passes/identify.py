"""Identify: names the other mechanisms in the graph, which are left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from llcompile.passes.candidate import GraphCandidate
from llcompile.passes.session import Session
from llcompile.patterns.boundary import boundary
from llcompile.patterns.graph.regions import Region
from llcompile.patterns.mechanisms import attention, convolutions, loops, pooling, scans, time_mixing, unnamed
from llcompile.patterns.mechanisms.facts import Facts
from llcompile.patterns.mechanisms.found import Found
from llcompile.patterns.reasons import looks_both_ways
from llcompile.patterns.records import Untouched
from llcompile.patterns.structure.program import Value
from llcompile.patterns.structure.record import record
from llcompile.torch_internals.places import module_of, user_line

Finder = Callable[[Facts], Iterator[Found]]

# What mixes positions by itself.
MIXERS: tuple[Finder, ...] = (attention.find, scans.find, loops.find)
# What may also stand before a mixer and belong to it: then it is no mechanism of its own.
HELPERS: tuple[Finder, ...] = (convolutions.find, time_mixing.find)
# What is named only where nothing else in the module is, in this order: most mixers have such a thing inside.
REST: tuple[tuple[Finder, ...], ...] = ((pooling.find,), (unnamed.find,))
_BIDIRECTIONAL = "bidirectional linear attention"


def identify(session: Session) -> int:
    """Fills `session.untouched`; returns how many mechanisms were named."""
    records: dict[tuple[str, str], Untouched] = {}
    rest: list[list[Untouched]] = [[] for _ in REST]
    for region in session.regions:
        with boundary("the mechanisms of a graph"):
            _name(session, region, records, rest)
    both = [missed for missed in session.near_misses if looks_both_ways(missed.code)]
    records.update({(m.module, _BIDIRECTIONAL): Untouched(m.module, _BIDIRECTIONAL, m.where) for m in both})
    session.near_misses = [missed for missed in session.near_misses if missed not in both]
    said = {r.module for r in records.values()} | {m.module for m in session.near_misses}
    said |= {candidate.module for candidate in session.candidates}
    for found in rest:
        new = {(r.module, r.kind): r for r in reversed(found) if r.module not in said}
        records.update(new)
        said |= {module for module, _ in new}
    session.untouched = list(records.values())
    named = {record.module for record in session.untouched if record.kind != _BIDIRECTIONAL}
    session.refused.extend(missed for missed in session.near_misses if missed.module not in named)
    return len(records)


def _name(
    session: Session, region: Region, records: dict[tuple[str, str], Untouched], rest: list[list[Untouched]]
) -> None:
    """Adds the mechanisms of one graph, and what is one only where nothing else is found."""
    facts = Facts(region, session.programs.get(region) or record(region))
    nodes = {candidate.node for candidate in session.candidates}
    candidates = {value for value in facts.values if value.node in nodes or (value.op and value.op.node in nodes)}
    mixers = [mixer for c in session.candidates if isinstance(c, GraphCandidate) for mixer in c.group]
    written = {value for mixer in mixers for op in mixer.ops for value in op.outputs}
    for found in _found(facts, candidates, written):
        said = _record(session, found)
        if not _is_candidate(session, found, said.module, said.where):
            records.setdefault((said.module, found.kind), said)
    fed = _feeding(facts, candidates)
    for finders, records_of in zip(REST, rest, strict=True):
        records_of += [
            _record(session, found) for find in finders for found in find(facts) if fed.isdisjoint(found.inside)
        ]


def _record(session: Session, found: Found) -> Untouched:
    key, path = module_of(found.node.meta)
    where = user_line(found.node.meta)
    return Untouched(session.name(key, path), found.kind, where, found.heads, found.groups)


def _found(facts: Facts, candidates: set[Value], written: set[Value]) -> Iterator[Found]:
    """The mechanisms of a graph, but for what is inside of hand-written mixers (`written`)."""
    mixers: list[Found] = []
    taken = set(written)
    for found in (found for find in MIXERS for found in find(facts)):
        if taken.isdisjoint(found.inside):  # the levels of a tree look like the steps of a loop
            mixers.append(found)
            taken |= found.inside
    yield from mixers
    fed = _feeding(facts, candidates.union(*(found.inside for found in mixers)))
    yield from (found for find in HELPERS for found in find(facts) if fed.isdisjoint(found.inside))


def _feeding(facts: Facts, mixers: set[Value]) -> set[Value]:
    """Every value from which a way leads to a mixer and no projection is on it."""
    found: set[Value] = set()
    for value in reversed(list(facts.values)):
        if any(u in mixers or (u in found and not facts.is_projection(u)) for u in facts.users(value)):
            found.add(value)
    return found


def _is_candidate(session: Session, found: Found, module: str, where: str) -> bool:
    """Whether it is a linear-time mixer that the report has already, its denominator, or a convolution before it."""
    candidates = [
        candidate
        for candidate in session.candidates
        if module == candidate.module or module.startswith(candidate.module + ".")
    ]
    if "convolution" in found.kind:
        return bool(candidates)
    if found.heads is not None or "attention" in found.kind:
        return any((module, where) == (s.module, s.where) for s in candidates)
    return any(_function(where) == _function(s.where) for s in candidates if module == s.module)


def _function(where: str) -> tuple[str, str]:
    """The file and the function of `file:line in function`: a loop has many lines."""
    place, _, function = where.partition(" in ")
    return place.rpartition(":")[0], function
