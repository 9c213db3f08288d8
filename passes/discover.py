"""Discover: finds the captured calls in the graph and names the module and the line that each belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from llcompile.passes.candidate import CallCandidate
from llcompile.passes.session import Session, module_name
from llcompile.patterns import reasons
from llcompile.patterns.known.capture import captured_function, take_refused
from llcompile.patterns.records import Declined
from llcompile.torch_internals import reach
from llcompile.torch_internals.places import module_of, place_of, user_line


def discover(session: Session) -> int:
    """Fills `session.candidates`; returns how many mixers were found."""
    calls = [
        (r, n, captured_function(n.target)) for r in session.regions for n in r.graph.nodes if n.op == "call_function"
    ]
    for region, node, captured in calls:
        if captured is None:
            continue
        key, name = place_of(node)
        candidate = CallCandidate(node, region, session.name(key, name), user_line(node.meta), captured=captured)
        if region.closed:
            candidate.decline(reasons.CLOSED_BODY(operation=region.closed))
        if key:
            candidate.owner = reach.find_module(key)
        session.candidates.append(candidate)
    session.refused.extend(refused_calls(session.settings.names))
    return len(session.candidates)


def refused_calls(names: Mapping[int, str]) -> list[Declined]:
    """The calls of opaque functions at which the trace has broken the graph since this was last asked."""
    found = [
        Declined.because(
            replace(call.given, hint=reasons.BREAKS), module_name(names, *module_of(call.meta)), user_line(call.meta)
        )
        for call in take_refused()
    ]
    return list(dict.fromkeys(found))  # Dynamo traces up to a break more than once
