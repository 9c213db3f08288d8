"""Check: the rules that a graph keeps between passes; a broken rule names the pass that broke it."""

from __future__ import annotations

from llcompile.errors import GraphError
from llcompile.passes.candidate import CallCandidate
from llcompile.passes.session import Session


def check(session: Session, after: str) -> None:
    """Raises GraphError where a graph is malformed, a node that is read has no value, or a rewritten call stays."""
    for region in session.regions:
        try:
            region.graph.lint()
        except RuntimeError as error:
            raise GraphError(f"the graph is malformed after pass {after!r}: {error}") from error
    nodes = [node for region in session.regions for node in region.graph.nodes]
    for node in nodes:
        if node in session.given:
            continue
        computed = node.op in ("call_function", "call_method")
        if node.users and computed and "example_value" not in node.meta:
            raise GraphError(f"node {node.format_node()} has no example_value after pass {after!r}")
    present = set(nodes)
    for candidate in session.candidates:
        if after == "rewrite" and isinstance(candidate, CallCandidate) and candidate.node in present:
            raise GraphError(f"the call at {candidate.where} is still in the graph after pass {after!r}")
