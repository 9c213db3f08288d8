"""Recognise: finds the mixers that are written out in the graph, by what they compute."""

from __future__ import annotations

import logging

from llcompile.passes import reach
from llcompile.passes.discover import module_of, place_of, user_line
from llcompile.passes.records import Declined
from llcompile.passes.regions import Region
from llcompile.passes.session import Session, Site
from llcompile.passes.structure.find import find
from llcompile.passes.structure.found import Found, Missed
from llcompile.patterns.mixer import MixerShape

log = logging.getLogger("llcompile")

_CLOSED = "move the mixer out of the control flow, or compile the part inside by itself"
_LEFT = "the code runs as it is"


def recognise(session: Session) -> int:
    """Adds a site for each hand-written mixer, and a record for each near miss; returns how many mixers there are."""
    before = len(session.sites)
    for region in session.regions:
        if region.closed:
            continue
        findings = find(region)
        session.structure_counts.update(findings.counts)
        log.debug("recognise: %s", ", ".join(f"{rule} {n}" for rule, n in sorted(findings.counts.items())))
        for found in findings.found:
            _add_site(session, region, found, findings.denominators.get(id(found), []))
        for missed in findings.missed:
            record = _declined(session, missed)
            session.near_misses.append(record)
            nodes = () if missed.part is None else (op.node for op in missed.part.ops)
            session.missed_nodes.setdefault(record, frozenset({*nodes, missed.anchor}))
    return len(session.sites) - before


def _add_site(session: Session, region: Region, found: Found, denominators: list[Found]) -> None:
    node = found.anchor
    key, name = place_of(node)
    owner = reach.find_module(key) if key else None
    site = Site(node, region, None, session.name(key, name), user_line(node.meta), found, denominators)
    site.owner, site.owner_missing = owner, bool(key) and owner is None
    site.cell, site.certificate = found.reading.family, found.certificate
    site.shape = MixerShape(*found.sizes)
    session.sites.append(site)


def _declined(session: Session, missed: Missed) -> Declined:
    key, name = module_of(missed.anchor.meta)
    return Declined(
        session.name(key, name), missed.miss.reason, user_line(missed.anchor.meta), missed.miss.hint or _LEFT
    )
