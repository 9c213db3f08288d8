"""Original: a copy of a graph in which every captured call is the library's own function again."""

from __future__ import annotations

from torch import fx

from llcompile.passes.candidate import CallCandidate
from llcompile.passes.rewrite_call import plain_call
from llcompile.passes.session import Session
from llcompile.patterns.graph.regions import Region


def original(session: Session) -> fx.GraphModule:
    """The model's own code as a graph of its own, so that the session's graph can be rewritten and looked at."""
    copies: dict[int, fx.GraphModule] = {}
    for region in reversed(session.regions):  # bodies come after the graphs that call them
        copies[id(region.module)] = _copied(session, region, copies)
    return copies[id(session.module)]


def _copied(session: Session, region: Region, copies: dict[int, fx.GraphModule]) -> fx.GraphModule:
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(region.graph, nodes)
    graph.output(result)
    for candidate in session.candidates:
        if isinstance(candidate, CallCandidate) and candidate.region is region:
            nodes[candidate.node].target = plain_call(candidate)
    module = fx.GraphModule(region.module, graph)
    for node in graph.find_nodes(op="get_attr"):
        body = copies.get(id(getattr(region.module, str(node.target), None)))
        if body is not None:
            setattr(module, str(node.target), body)
    return module
